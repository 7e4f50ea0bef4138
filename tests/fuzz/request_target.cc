// Requests of each protocol, from the bytes that a client sends to what the engine is asked: what validation accepts,
// the engine must be able to run. Of the dialects, replies too.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "dejavu/v1/generation.pb.h"
#include "engine/serving/check_request.h"
#include "engine/text/tokenizer.h"
#include "kernels/base/utf8.h"
#include "kserve/inference.pb.h"
#include "server/api/kserve_dialect.h"
#include "server/api/kserve_tensors.h"
#include "server/api/validate.h"
#include "server/api/vllm_dialect.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"
#include "tests/fuzz/target.h"
#include "tests/server/fake_engine.h"
#include "vllm/engine.pb.h"

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

const World& TheWorld() {
  static const World& world = *new World;
  return world;
}

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

void CheckAccepted(const CheckedGenerate& checked, const World& world) {
  CheckRunnable(checked.request, world.options, world);
  CHECK(checked.samples >= 1 && checked.samples <= world.options.max_samples) << checked.samples;
  CHECK(checked.stop_strings.size() <= static_cast<size_t>(world.options.max_stop_strings)) << "stop strings";
  for (const std::string& stop : checked.stop_strings) {
    CHECK(!stop.empty() && stop.size() <= static_cast<size_t>(world.options.max_stop_string_bytes)) << stop;
  }
}

void CheckGenerating(const v1::GenerateRequest& request, bool streaming, const World& world) {
  const absl::StatusOr<CheckedGenerate> checked =
      CheckGenerate(request, world.options, world.model, kDrawnSeed, streaming);
  if (!checked.ok()) return CheckRefused(checked.status());
  CheckAccepted(*checked, world);
}

void Run(absl::string_view bytes) {
  const World& world = TheWorld();
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

// What the engine could say to it: one of a sample's chunks, with so many tokens.
v1::GenerateChunk ChunkOf(const v1::GenerateRequest& request, uint32_t sample, int tokens, bool last) {
  v1::GenerateChunk chunk;
  chunk.set_sample(sample);
  chunk.mutable_prompt()->set_prompt_tokens(3);
  chunk.set_text("a \xF0\x9F\x8C\x8D");
  for (int i = 0; i < tokens; ++i) {
    chunk.add_token_ids(static_cast<uint32_t>(5 + i));
    if (!request.output().logprobs() && request.output().top_logprobs() == 0) continue;
    v1::TokenLogprobs& logprobs = *chunk.add_logprobs();
    logprobs.set_logprob(-1.5f);
    for (uint32_t k = 0; k < std::min(2u, request.output().top_logprobs()); ++k) {
      logprobs.add_top()->set_id(300 + k);
    }
  }
  if (last) chunk.mutable_finish()->set_generated_tokens(static_cast<uint32_t>(tokens));
  return chunk;
}

// All that a dialect replies: to each chunk where it streams, else once all samples have come. `look` says how many new
// tokens a reply has, 0 where it does not tell.
using Look = absl::FunctionRef<int(const google::protobuf::MessageLite&)>;
void CheckReplies(const v1::GenerateRequest& request, int samples, Dialect* dialect, Look look) {
  int sent = 0, told = 0, replies = 0;
  for (int sample = 0; sample < samples; ++sample) {
    for (const bool last : {false, true}) {
      if (!last && !dialect->streams()) continue;
      v1::GenerateChunk chunk = ChunkOf(request, static_cast<uint32_t>(sample), last ? 2 : 1, last);
      sent += chunk.token_ids_size();
      dialect->Take(&chunk);
      bool more = true;
      while (more) {
        const google::protobuf::MessageLite* const reply = dialect->Next(&more);
        CHECK(reply != nullptr || !more) << "more is to follow nothing";
        if (reply == nullptr) continue;
        told += look(*reply);
        ++replies;
      }
    }
  }
  CHECK(replies > 0 && (told == sent || told == 0)) << replies << " replies tell " << told << " tokens of " << sent;
  dialect->Release();
}

// As GenerateCall has it: what the client is told.
absl::Status CheckDialect(absl::string_view bytes, Dialect* dialect, Look look) {
  const World& world = TheWorld();
  const grpc::Slice slice(bytes.data(), bytes.size());
  v1::GenerateRequest request;
  absl::Status told = dialect->Read(grpc::ByteBuffer(&slice, 1), &request);
  if (told.ok()) {
    const absl::StatusOr<CheckedGenerate> checked =
        CheckGenerate(request, world.options, world.model, kDrawnSeed, dialect->streams());
    told = dialect->Renamed(checked.status());
    if (checked.ok()) {
      CheckAccepted(*checked, world);
      CheckReplies(request, checked->samples, dialect, look);
    }
  }
  if (!told.ok()) CheckRefused(told);
  return told;
}

// Tensors hold what they say. The tokens that are told.
int CheckTensors(const inference::ModelInferResponse& reply) {
  int tokens = 0;
  CHECK(reply.outputs_size() == reply.raw_output_contents_size()) << reply.outputs_size();
  for (int i = 0; i < reply.outputs_size(); ++i) {
    const auto& output = reply.outputs(i);
    absl::string_view raw = reply.raw_output_contents(i);
    CHECK(output.shape_size() == 1 && output.shape(0) > 0) << output.name();
    const auto elements = static_cast<size_t>(output.shape(0));
    if (output.name() == "output_ids") tokens = static_cast<int>(elements);
    for (size_t element = 0; element < elements; ++element) {
      uint32_t number = 0;
      CHECK(raw.size() >= sizeof(number)) << output.name();
      std::memcpy(&number, raw.data(), sizeof(number));
      raw.remove_prefix(sizeof(number));
      if (output.datatype() != "BYTES") continue;  // all others have four bytes
      CHECK(raw.size() >= number && IsValidUtf8(raw.substr(0, number))) << output.name();
      raw.remove_prefix(number);
    }
    CHECK(raw.empty()) << output.name() << " has more than its elements";
  }
  return tokens;
}

// A tensor, and a prompt beside it.
std::string WithTensor(absl::string_view name, absl::string_view datatype, const std::vector<int64_t>& shape,
                       absl::string_view raw, bool prompt) {
  inference::ModelInferRequest request;
  auto& tensor = *request.add_inputs();
  tensor.set_name(std::string(name));
  tensor.set_datatype(std::string(datatype));
  for (const int64_t dim : shape) tensor.add_shape(dim);
  request.add_raw_input_contents(std::string(raw));
  if (prompt) {
    auto& text = *request.add_inputs();
    text.set_name("text_input");
    text.set_datatype("BYTES");
    text.add_shape(1);
    AppendBytes("to be", request.add_raw_input_contents());
  }
  return request.SerializeAsString();
}

// What a mutation of a message's bytes would hardly find.
std::string DrawnTensor(FuzzInput input) {
  constexpr absl::string_view kTypes[] = {"BOOL", "INT32", "UINT32", "INT64", "FP32", "bytes", ""};
  const KServeTensor& tensor = KServeInputs()[input.Below(static_cast<uint32_t>(KServeInputs().size()))];
  const uint32_t type = input.Below(2 * std::size(kTypes));
  std::vector<int64_t> shape(input.Below(4));
  for (int64_t& dim : shape) dim = static_cast<int8_t>(input.Byte());
  const bool prompt = (input.Byte() & 1) != 0;
  return WithTensor(tensor.name, type < std::size(kTypes) ? kTypes[type] : KServeTypeName(tensor.type), shape,
                    input.Rest(), prompt);
}

// The first byte: 0, a message; 1, sampling parameters; 2, a tensor; and 4 more in a stream.
void RunKServe(absl::string_view bytes) {
  FuzzInput input(bytes);
  const uint8_t kind = input.Byte();
  std::string message, text;
  if (kind % 4 == 1) {
    AppendBytes(input.Rest(), &text);
    message = WithTensor("sampling_parameters", "BYTES", {1}, text, /*prompt=*/true);
  } else {
    message = kind % 4 == 2 ? DrawnTensor(input) : std::string(input.Rest());
  }
  const bool in_stream = (kind & 4) != 0;
  KServeDialect dialect(TheWorld().model, in_stream);
  const absl::Status status = CheckDialect(message, &dialect, [&](const google::protobuf::MessageLite& reply) {
    if (!in_stream) return CheckTensors(static_cast<const inference::ModelInferResponse&>(reply));
    return CheckTensors(static_cast<const inference::ModelStreamInferResponse&>(reply).infer_response());
  });
  const size_t error_bytes = dialect.ErrorReply(status).ByteSizeLong();
  CHECK(error_bytes <= 4096) << error_bytes;
}

void RunVllm(absl::string_view bytes) {
  VllmDialect dialect;
  (void)CheckDialect(bytes, &dialect, [&](const google::protobuf::MessageLite& reply) {
    const auto& response = static_cast<const vllm::grpc::engine::GenerateResponse&>(reply);
    CHECK(response.response_case() != vllm::grpc::engine::GenerateResponse::RESPONSE_NOT_SET) << "an empty reply";
    if (response.has_chunk()) return response.chunk().token_ids_size();
    return dialect.streams() ? 0 : response.complete().output_ids_size();  // of a stream: said again
  });
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

FuzzTarget KserveRequestTarget() {
  inference::ModelInferRequest message;
  message.set_id("7");
  message.set_model_name("books");
  for (const auto& [name, datatype, raw] : std::initializer_list<std::array<std::string, 3>>{
           {"input_ids", "INT32", Raw("\2\0\0\0")},
           {"sampling_parameters", "BYTES", Raw("\x0c\0\0\0{\"stop\":\"a\"}")},
           {"stream", "BOOL", Raw("\1")},
           {"return_logprobs", "BOOL", Raw("\1")}}) {
    auto& tensor = *message.add_inputs();
    tensor.set_name(name);
    tensor.set_datatype(datatype);
    tensor.add_shape(1);
    message.add_raw_input_contents(raw);
  }
  for (const KServeTensor& output : KServeOutputs()) {
    if (absl::string_view(output.name) != "cumulative_logprob") message.add_outputs()->set_name(output.name);
  }
  inference::ModelInferRequest contents;
  auto& text = *contents.add_inputs();
  text.set_name("text_input");
  text.set_datatype("BYTES");
  text.add_shape(1);
  text.mutable_contents()->add_bytes_contents("to be");
  (*contents.mutable_parameters())["temperature"].set_double_param(0.5);
  (*contents.mutable_parameters())["max_tokens"].set_int64_param(4);
  (*contents.mutable_parameters())["sequence_id"].set_int64_param(0);
  (*contents.mutable_parameters())["timeout"].set_uint64_param(1'000'000);
  const std::string everything =
      R"({"n":2,"temperature":"0.7","top_p":0.9,"top_k":-1,"min_p":0.05,"seed":7,"stop":["a","b"],"stop_token_ids":[5],)"
      R"("max_tokens":20,"min_tokens":2,"logprobs":2,"logit_bias":{"7":-1.5},"allowed_token_ids":[5,6],"ignore_eos":true,)"
      R"("repetition_penalty":1.1,"presence_penalty":0.5,"frequency_penalty":-0.5,"include_stop_str_in_output":true,)"
      R"("best_of":1,"skip_special_tokens":true,"bad_words":[],"stream":null})";
  return {"kserve_request",
          1024,
          RunKServe,
          {absl::StrCat("\4", message.SerializeAsString()), absl::StrCat(Raw("\0"), contents.SerializeAsString()),
           absl::StrCat("\1", everything), absl::StrCat("\5", R"({"max_tokens":3,"logprobs":0})"),
           Raw("\2\0\x0d\1\1\0\3\0\0\0abc"), Raw("\2\1\x0d\2\1\2\0\2\0\0\0\5\0\0\0"), Raw("\6\2\x0d\1\1\1\1")},
          {"\"temperature\":", "\"n\":", "1e400", "18446744073709551616", "-9223372036854775809", "\\ud800", "\\u0000",
           "[[[[", "{\"\":", "sequence_", "priority", "timeout", "triton_enable_empty_final_response",
           "shared_memory_region", "INT64", "UINT32", Raw("\xff\xff\xff\xff"), Raw("\xff\xff\xff\x7f"),
           "\x28\xff\xff\xff\xff\xff\xff\xff\xff\x7f"}};
}

FuzzTarget VllmRequestTarget() {
  namespace engine = vllm::grpc::engine;
  engine::GenerateRequest ids;
  ids.set_request_id("r1");
  for (const uint32_t id : {2u, 5u, 7u}) ids.mutable_tokenized()->add_input_ids(id);
  engine::SamplingParams& params = *ids.mutable_sampling_params();
  params.set_temperature(0.7f);
  params.set_top_p(0.9f);
  params.set_top_k(40);
  params.set_min_p(0.05f);
  params.set_frequency_penalty(0.5f);
  params.set_presence_penalty(-0.5f);
  params.set_repetition_penalty(1.1f);
  params.set_max_tokens(20);
  params.set_min_tokens(2);
  params.add_stop("\n\n");
  params.add_stop_token_ids(9);
  params.set_n(2);
  params.set_seed(7);
  params.set_logprobs(2);
  (*params.mutable_logit_bias())[7] = -1.5f;
  engine::GenerateRequest text;
  text.set_text("to be");
  text.set_stream(true);
  text.mutable_sampling_params()->set_max_tokens(3);
  text.mutable_sampling_params()->set_logprobs(0);
  engine::GenerateRequest refused = text;
  refused.mutable_sampling_params()->set_regex(".*");
  return {"vllm_request",
          1024,
          RunVllm,
          {ids.SerializeAsString(), text.SerializeAsString(), refused.SerializeAsString()},
          {"\xff\xff\xff\xff\x0f", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", Raw("\0\0\xc0\x7f"), "\xff\xff\x7f\x7f",
           Raw("\0\0\x80\x7f"), "\x1a\x01x", "\x12\x04\x12\x02\x05\x07", "\xb8\x06\x01", "\x5b\x5c", "\xd2\x01\x05"}};
}

}  // namespace dejavu
