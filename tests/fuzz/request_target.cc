// Requests of the API, from the bytes that a client sends to what the engine is asked: what validation accepts, the
// engine must be able to run.
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dejavu/v1/generation.pb.h"
#include "engine/serving/check_request.h"
#include "engine/text/tokenizer.h"
#include "kernels/base/utf8.h"
#include "server/api/validate.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"
#include "tests/fuzz/target.h"
#include "tests/server/fake_engine.h"

namespace dejavu {
namespace {

constexpr uint64_t kDrawnSeed = 77;

struct World {
  World() {
    RouteProtobufLog();
    tokenizer = Tokenizer::Load(EMBEDDED_MODEL).value();
    engine.config.vocab = tokenizer->vocab_size() + 8;
    engine.predictor_info.tiers = {Tier::kHigh, Tier::kBalanced};
    model = {"books", engine.config.vocab, engine.config.context, tokenizer.get(), &engine};
  }
  ServerOptions options;
  FakeEngine engine;
  std::unique_ptr<Tokenizer> tokenizer;
  ServedModel model;
};

void CheckRefused(const absl::Status& status) {
  using Code = absl::StatusCode;
  CHECK(status.code() == Code::kInvalidArgument || status.code() == Code::kNotFound ||
        status.code() == Code::kFailedPrecondition)
      << status;
  const grpc::Status sent = ToGrpcStatus(status);
  CHECK(sent.error_message().size() + sent.error_details().size() <= 4096) << sent.error_message().size() << " bytes";
  CheckAnswer(absl::InvalidArgumentError(sent.error_message()), {Code::kInvalidArgument}, 4096);
}

// As the engine will see it.
void CheckRunnable(const Request& request, const ServerOptions& options, const World& world) {
  const absl::Status runnable = CheckRequest(request, world.engine.config);
  CHECK(runnable.ok()) << runnable;
  CHECK(world.engine.CheckTier(request.sparsity.tier).ok()) << Name(request.sparsity.tier);
  const SamplingParams& s = request.sampling;
  for (const float x :
       {s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty}) {
    CHECK(x == 0.0f || std::isnormal(x)) << x;
  }
  CHECK(s.top_p > 0.0f && s.top_p <= 1.0f && s.repetition_penalty > 0.0f && s.top_k >= 0) << s.top_p;
  CHECK(s.logit_bias.size() <= static_cast<size_t>(options.max_logit_bias)) << s.logit_bias.size();
  for (size_t i = 1; i < s.logit_bias.size(); ++i) CHECK(s.logit_bias[i - 1].first < s.logit_bias[i].first) << i;
  for (size_t i = 1; i < s.allowed_token_ids.size(); ++i)
    CHECK(s.allowed_token_ids[i - 1] < s.allowed_token_ids[i]) << i;
  CHECK(request.min_new_tokens >= 0 && request.min_new_tokens <= request.max_new_tokens) << request.min_new_tokens;
  CHECK(request.top_logprobs <= options.max_top_logprobs) << request.top_logprobs;
  CHECK(request.score_top_logprobs <= options.max_top_logprobs) << request.score_top_logprobs;
  CHECK(request.sparsity.shadow_every >= 0 && request.sparsity.shadow_every <= kMaxShadowEvery)
      << request.sparsity.shadow_every;
  CHECK(request.cache_salt.size() <= 128 && std::abs(request.priority) <= 100) << request.priority;
}

// The same bytes in one slice and cut into several are the same message or none.
template <typename Message>
bool Parse(absl::string_view bytes, uint8_t cut, Message* message) {
  std::vector<grpc::Slice> slices;
  const size_t length = cut == 0 ? bytes.size() : cut;
  for (size_t at = 0; at < bytes.size(); at += length) {
    const absl::string_view part = bytes.substr(at, length);
    slices.emplace_back(part.data(), part.size());
  }
  const grpc::ByteBuffer buffer(slices.data(), slices.size());
  const absl::Status status = ParseMessage(buffer, message);
  if (!status.ok()) CheckRefused(status);
  Message whole;
  const grpc::Slice slice(bytes.data(), bytes.size());
  CHECK(ParseMessage(grpc::ByteBuffer(&slice, 1), &whole).ok() == status.ok()) << status;
  if (!status.ok()) return false;
  std::string again;
  CHECK(message->SerializeToString(&again)) << "a message that cannot be written";
  CHECK(whole.ParseFromString(again)) << "what was written cannot be read";
  return true;
}

void CheckGenerating(const v1::GenerateRequest& request, bool streaming, const World& world) {
  const absl::StatusOr<CheckedGenerate> checked =
      CheckGenerate(request, world.options, world.model, kDrawnSeed, streaming);
  if (!checked.ok()) return CheckRefused(checked.status());
  CheckRunnable(checked->request, world.options, world);
  CHECK(checked->samples >= 1 && checked->samples <= world.options.max_samples) << checked->samples;
  CHECK(checked->stop_strings.size() <= static_cast<size_t>(world.options.max_stop_strings)) << "stop strings";
  for (const std::string& stop : checked->stop_strings) {
    CHECK(!stop.empty() && stop.size() <= static_cast<size_t>(world.options.max_stop_string_bytes)) << stop;
  }
}

void Run(absl::string_view bytes) {
  static const World& world = *new World;
  FuzzInput input(bytes);
  const uint8_t kind = input.Byte(), cut = input.Byte();
  switch (kind % 4) {
    case 0: {
      v1::GenerateRequest request;
      if (Parse(input.Rest(), cut, &request)) CheckGenerating(request, (kind & 4) != 0, world);
      break;
    }
    case 1: {
      v1::ScoreRequest request;
      if (!Parse(input.Rest(), cut, &request)) break;
      const absl::StatusOr<std::vector<Request>> checked = CheckScore(request, world.options, world.model);
      if (!checked.ok()) return CheckRefused(checked.status());
      CHECK(!checked->empty() && checked->size() <= static_cast<size_t>(kMaxScorePrompts)) << checked->size();
      for (const Request& prompt : *checked) CheckRunnable(prompt, world.options, world);
      break;
    }
    case 2: {
      v1::TokenizeRequest request;
      if (!Parse(input.Rest(), cut, &request)) break;
      const absl::StatusOr<std::vector<int32_t>> ids = CheckTokenize(request, world.model);
      if (!ids.ok()) return CheckRefused(ids.status());
      CHECK(ids->size() <= request.text().size() + 1) << ids->size() << " tokens";
      break;
    }
    default: {
      v1::DetokenizeRequest request;
      if (!Parse(input.Rest(), cut, &request)) break;
      const absl::StatusOr<std::string> text = CheckDetokenize(request, world.model);
      if (!text.ok()) return CheckRefused(text.status());
      CHECK(IsValidUtf8(*text)) << *text;
    }
  }
}

std::string Seed(char kind, const google::protobuf::Message& message) {
  return absl::StrCat(std::string{kind, '\0'}, message.SerializeAsString());
}

v1::GenerateRequest Everything() {
  v1::GenerateRequest request;
  request.set_request_id("id-1.a:b");
  request.set_model("books");
  request.set_text("Once upon a time");
  v1::Sampling& sampling = *request.mutable_sampling();
  sampling.set_temperature(0.7f);
  sampling.set_top_k(40);
  sampling.set_top_p(0.9f);
  sampling.set_min_p(0.05f);
  sampling.set_seed(1234567890123);
  sampling.set_samples(2);
  v1::Penalties& penalties = *request.mutable_penalties();
  penalties.set_repetition(1.1f);
  penalties.set_presence(-0.5f);
  penalties.set_frequency(0.5f);
  (*penalties.mutable_logit_bias())[7] = -100.0f;
  for (const uint32_t id : {5u, 6u, 7u}) penalties.add_allowed_token_ids(id);
  v1::Stopping& stopping = *request.mutable_stopping();
  stopping.set_max_new_tokens(20);
  stopping.set_min_new_tokens(2);
  stopping.add_stop_strings("\n\n");
  stopping.set_include_stop_string(true);
  stopping.add_stop_token_ids(9);
  stopping.set_max_time_s(2.5f);
  request.mutable_output()->set_top_logprobs(5);
  request.mutable_sparsity()->set_tier(v1::TIER_BALANCED);
  request.mutable_sparsity()->set_shadow_every(64);
  request.mutable_scheduling()->set_urgency(v1::URGENCY_BATCH);
  request.mutable_scheduling()->set_priority(-7);
  request.mutable_scheduling()->set_inter_token_target_ms(50.0f);
  request.mutable_scheduling()->set_cache_salt("salt");
  return request;
}

}  // namespace

FuzzTarget RequestTarget() {
  v1::GenerateRequest ids;
  for (const uint32_t id : {2u, 5u, 7u}) ids.mutable_token_ids()->add_ids(id);
  v1::ScoreRequest score;
  score.set_text("to be or not");
  score.set_top_logprobs(3);
  v1::TokenizeRequest tokenize;
  tokenize.set_text("It's \xF0\x9F\x8C\x8D");
  v1::DetokenizeRequest detokenize;
  for (const uint32_t id : {2u, 300u, 301u}) detokenize.add_token_ids(id);
  const std::string huge = absl::StrCat(std::string{4, 3}, "\x1a\x20", std::string(32, 'x'));
  return {"request",
          1024,
          Run,
          {Seed(0, Everything()), Seed(4, ids), Seed(1, score), Seed(2, tokenize), Seed(3, detokenize), huge},
          {"\xff\xff\xff\xff\x0f", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", Raw("\0\0\xc0\x7f"), "\xff\xff\x7f\x7f",
           Raw("\0\0\x80\x7f"), "\x1a\x01x", "\x22\x04\x0a\x02\x05\x07", "\x3a\x02\x08\x05", "\xed\xa0\x80", "\x5b\x5c",
           "\x2a\x05\x0d", "\x12\x05\x62ooks"}};
}

}  // namespace dejavu
