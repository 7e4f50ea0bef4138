// The real server with the real engine and the embedded model, through a real gRPC client.
#include <atomic>
#include <chrono>
#include <optional>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "dejavu/v1/generation.grpc.pb.h"
#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "gtest/gtest.h"
#include "server/server.h"
#include "tests/engine/serving/collecting_sink.h"
#include "tests/server/raw_call.h"

namespace dejavu {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using std::chrono::milliseconds;
using testing::HasSubstr;

constexpr char kPrompt[] = "It was a dark night and";
constexpr uint32_t kLong = 480;  // tokens; with the prompt it fits the context of 512

// What a stream delivered, put together.
struct Streamed {
  v1::GenerateResponse response;
  int chunks = 0;
  grpc::Status status;
};

class EndToEnd : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    tokenizer_ = Tokenizer::Load(EMBEDDED_MODEL).value().release();
    engine_ = MakeEngine().release();
  }
  static void TearDownTestSuite() {
    delete engine_;
    delete tokenizer_;
  }

  EndToEnd() { Start({}); }

  static std::unique_ptr<Engine> MakeEngine() {
    EngineOptions options;
    options.model = EMBEDDED_MODEL;
    options.device = "cpu";
    options.predictor = "none";
    return Engine::Create(options, tokenizer_->vocab_size(), [](int64_t, int64_t) { return true; }).value();
  }

  void Start(ServerOptions options) {
    server_.reset();
    options.listen = "127.0.0.1:0";
    options.metrics_listen = "";
    EngineOptions engine_options;
    engine_options.model = EMBEDDED_MODEL;
    server_ = Server::Start(options, engine_options).value();
    server_->SetReady(engine_, tokenizer_);
    stub_ = v1::GenerationService::NewStub(Channel());
  }

  // A connection of its own.
  std::shared_ptr<grpc::Channel> Channel() {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);  // windows stay at 64 KiB
    return grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(server_->port()), grpc::InsecureChannelCredentials(),
                                     arguments);
  }

  static v1::GenerateRequest Request(uint32_t max_new_tokens, const std::string& text = kPrompt) {
    v1::GenerateRequest request;
    request.set_text(text);
    request.mutable_stopping()->set_max_new_tokens(max_new_tokens);
    request.mutable_stopping()->set_ignore_eos(true);
    return request;
  }

  static Streamed ReadAll(grpc::ClientReaderInterface<v1::GenerateChunk>* reader) {
    Streamed streamed;
    v1::GenerateChunk chunk;
    while (reader->Read(&chunk)) {
      EXPECT_EQ(chunk.has_prompt(), streamed.chunks == 0);
      EXPECT_FALSE(streamed.response.has_finish()) << "a chunk after the last";
      ++streamed.chunks;
      std::string text = streamed.response.text() + chunk.text();
      v1::GenerateResponse part;
      part.ParseFromString(chunk.SerializeAsString());
      streamed.response.MergeFrom(part);
      streamed.response.set_text(text);
    }
    streamed.status = reader->Finish();
    return streamed;
  }
  static Streamed Stream(v1::GenerationService::Stub* stub, const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    return ReadAll(stub->GenerateStream(&context, request).get());
  }

  grpc::Status Generate(const v1::GenerateRequest& request, v1::GenerateResponse* response) {
    grpc::ClientContext context;
    return stub_->Generate(&context, request, response);
  }

  v1::Load Load() {
    grpc::ClientContext context;
    v1::GetServerInfoResponse info;
    EXPECT_TRUE(stub_->GetServerInfo(&context, {}, &info).ok());
    return info.load();
  }
  // And nothing is held. A call that its client has given up may still come.
  void WaitUntilNothingRuns() {
    const auto until = std::chrono::steady_clock::now() + std::chrono::minutes(2);
    for (v1::Load load = Load();
         load.running_requests() + load.waiting_requests() > 0 || load.kv_blocks_free() != load.kv_blocks_total();
         load = Load()) {
      ASSERT_LT(std::chrono::steady_clock::now(), until) << load.ShortDebugString();
      std::this_thread::yield();
    }
  }

  // While it lives, every step takes some ms, so that a stream of kLong tokens lasts for seconds.
  class Brake {
   public:
    Brake() {
      dejavu::Request request;
      request.prompt = {2};
      request.max_new_tokens = kLong;
      request.ignore_eos = true;
      const auto sink = std::make_shared<CollectingSink>([](size_t) {
        std::this_thread::sleep_for(milliseconds(5));
        return true;
      });
      id_ = engine_->Submit(request, sink).value();
      sink->WaitForTokens(1);
    }
    ~Brake() { engine_->Cancel(id_); }

   private:
    uint64_t id_;
  };

  static const Tokenizer* tokenizer_;
  static Engine* engine_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<v1::GenerationService::Stub> stub_;
};
const Tokenizer* EndToEnd::tokenizer_ = nullptr;
Engine* EndToEnd::engine_ = nullptr;

TEST_F(EndToEnd, AUnaryCallAndAStreamSayTheSame) {
  constexpr int kTokens = 400;  // not all of them in one chunk
  v1::GenerateRequest request = Request(kTokens);
  request.set_request_id("same");
  request.mutable_sampling()->set_temperature(0.9f);
  request.mutable_sampling()->set_seed(5);
  request.mutable_output()->set_top_logprobs(3);
  v1::GenerateResponse unary;
  ASSERT_TRUE(Generate(request, &unary).ok());
  EXPECT_EQ(unary.prompt().request_id(), "same");
  EXPECT_EQ(unary.prompt().model(), "opt-8m-books");
  EXPECT_EQ(unary.prompt().seed(), 5u);
  EXPECT_EQ(unary.prompt().max_new_tokens(), uint32_t{kTokens});
  EXPECT_EQ(unary.token_ids_size(), kTokens);
  EXPECT_EQ(unary.logprobs_size(), kTokens);
  EXPECT_EQ(unary.logprobs(7).top_size(), 3);
  EXPECT_EQ(unary.finish().reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(unary.finish().generated_tokens(), uint32_t{kTokens});
  EXPECT_GT(unary.finish().timings().ttft_ms(), 0);
  EXPECT_LE(unary.finish().timings().ttft_ms(), unary.finish().timings().total_ms());
  EXPECT_EQ(unary.text(),
            tokenizer_->Decode(std::vector<int32_t>(unary.token_ids().begin(), unary.token_ids().end()), true));

  Streamed streamed = Stream(stub_.get(), request);
  ASSERT_TRUE(streamed.status.ok()) << streamed.status.error_message();
  EXPECT_GT(streamed.chunks, 1);
  unary.mutable_finish()->clear_timings();
  streamed.response.mutable_finish()->clear_timings();
  EXPECT_EQ(streamed.response.SerializeAsString(), unary.SerializeAsString());
}

TEST_F(EndToEnd, ReturnsTheSeedThatItDrew) {
  v1::GenerateRequest request = Request(20);
  request.mutable_sampling()->set_temperature(1);
  v1::GenerateResponse first, second;
  ASSERT_TRUE(Generate(request, &first).ok());
  EXPECT_LT(first.prompt().seed(), uint64_t{1} << 32);
  request.mutable_sampling()->set_seed(first.prompt().seed());
  ASSERT_TRUE(Generate(request, &second).ok());
  EXPECT_EQ(second.text(), first.text());
}

TEST_F(EndToEnd, StopsAtAStopString) {
  v1::GenerateResponse whole, stopped;
  ASSERT_TRUE(Generate(Request(60), &whole).ok());
  v1::GenerateRequest request = Request(60);
  const std::string stop = whole.text().substr(whole.text().size() / 2, 5);
  request.mutable_stopping()->add_stop_strings(stop);
  ASSERT_TRUE(Generate(request, &stopped).ok());
  EXPECT_EQ(stopped.text(), whole.text().substr(0, whole.text().find(stop)));
  EXPECT_EQ(stopped.finish().reason(), v1::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(stopped.finish().stop_string(), stop);
}

TEST_F(EndToEnd, ScoresWhatItGeneratedAsItReported) {
  v1::GenerateRequest request = Request(12);
  request.mutable_output()->set_logprobs(true);
  v1::GenerateResponse generated;
  ASSERT_TRUE(Generate(request, &generated).ok());

  v1::ScoreRequest score;
  for (int32_t id : tokenizer_->EncodePrompt(kPrompt)) score.mutable_token_ids()->add_ids(static_cast<uint32_t>(id));
  const int prompt_tokens = score.token_ids().ids_size();
  for (uint32_t id : generated.token_ids()) score.mutable_token_ids()->add_ids(id);
  score.set_top_logprobs(2);
  grpc::ClientContext context;
  v1::ScoreResponse scored;
  ASSERT_TRUE(stub_->Score(&context, score, &scored).ok());
  ASSERT_EQ(scored.tokens_size(), prompt_tokens + 12);
  EXPECT_FALSE(scored.tokens(0).has_logprob());
  for (int i = 0; i < 12; ++i) {
    const v1::ScoredToken& token = scored.tokens(prompt_tokens + i);
    EXPECT_EQ(token.id(), generated.token_ids(i));
    EXPECT_NEAR(token.logprob(), generated.logprobs(i).logprob(), 1e-3);
    EXPECT_EQ(token.rank(), 1u);  // greedy
    EXPECT_EQ(scored.tokens(prompt_tokens + i - 1).top(0).id(), token.id());
  }
}

TEST_F(EndToEnd, TokenizesBothWays) {
  grpc::ClientContext tokenize_context, detokenize_context;
  v1::TokenizeRequest tokenize;
  tokenize.set_text(kPrompt);
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(stub_->Tokenize(&tokenize_context, tokenize, &tokens).ok());
  EXPECT_EQ(tokens.token_ids(0), 2u);
  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_token_ids() = tokens.token_ids();
  v1::DetokenizeResponse text;
  ASSERT_TRUE(stub_->Detokenize(&detokenize_context, detokenize, &text).ok());
  EXPECT_EQ(text.text(), kPrompt);
}

TEST_F(EndToEnd, DescribesTheModel) {
  grpc::ClientContext context;
  v1::GetModelInfoResponse info;
  ASSERT_TRUE(stub_->GetModelInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.layers(), 8u);
  EXPECT_EQ(info.context_tokens(), 512u);
  EXPECT_EQ(info.weight_dtype(), "float16");
  EXPECT_TRUE(info.has_tokenizer());
}

TEST_F(EndToEnd, RefusesBadRequestsWithTheirField) {
  v1::GenerateRequest request = Request(4);
  request.mutable_sampling()->set_temperature(std::numeric_limits<float>::quiet_NaN());
  v1::GenerateResponse response;
  const grpc::Status status = Generate(request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("sampling.temperature is nan"));
  EXPECT_TRUE(HasDetail(status, "BadRequest"));
  EXPECT_EQ(RawCall(Channel(), "/dejavu.v1.GenerationService/GenerateStream", "\xFF").error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
  request = Request(4);
  request.set_model("other");
  EXPECT_EQ(Generate(request, &response).error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(EndToEnd, TellsWhichTiersItServes) {
  grpc::ClientContext context;
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(stub_->GetServerInfo(&context, {}, &info).ok());
  EXPECT_EQ(info.sparsity().default_tier(), v1::TIER_EXACT);
  EXPECT_THAT(info.sparsity().available_tiers(), testing::ElementsAre(v1::TIER_DENSE, v1::TIER_EXACT));
  EXPECT_EQ(info.sparsity().predictor(), "");
}

TEST_F(EndToEnd, TheTierOfAReplyIsTheOneThatWasAskedFor) {
  v1::GenerateResponse by_default, dense;
  ASSERT_TRUE(Generate(Request(20), &by_default).ok());
  EXPECT_EQ(by_default.prompt().tier(), v1::TIER_EXACT);
  EXPECT_TRUE(by_default.finish().has_sparsity());
  v1::GenerateRequest request = Request(20);
  request.mutable_sparsity()->set_tier(v1::TIER_DENSE);
  request.mutable_sparsity()->set_deterministic(true);
  request.mutable_sparsity()->set_shadow_every(1);  // for predicted tiers; harmless elsewhere
  ASSERT_TRUE(Generate(request, &dense).ok());
  EXPECT_EQ(dense.prompt().tier(), v1::TIER_DENSE);
  EXPECT_FALSE(dense.finish().sparsity().has_shadow());
  EXPECT_EQ(dense.text(), by_default.text());
}

TEST_F(EndToEnd, RefusesATierWithoutItsPredictorWhileOtherStreamsGoOn) {
  v1::GenerateResponse alone;
  ASSERT_TRUE(Generate(Request(200), &alone).ok());
  grpc::ClientContext context;
  const auto reader = stub_->GenerateStream(&context, Request(200));
  reader->WaitForInitialMetadata();  // comes with the first chunk
  v1::GenerateRequest request = Request(4);
  for (const v1::Tier tier : {v1::TIER_HIGH, v1::TIER_BALANCED, v1::TIER_FAST}) {
    request.mutable_sparsity()->set_tier(tier);
    v1::GenerateResponse response;
    const grpc::Status unary = Generate(request, &response);
    EXPECT_EQ(unary.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
    EXPECT_THAT(unary.error_message(), HasSubstr("needs a predictor"));
    EXPECT_TRUE(HasDetail(unary, "PreconditionFailure"));
    const Streamed streamed = Stream(stub_.get(), request);
    EXPECT_EQ(streamed.status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
    EXPECT_EQ(streamed.chunks, 0);
  }
  const Streamed beside = ReadAll(reader.get());
  EXPECT_TRUE(beside.status.ok()) << beside.status.error_message();
  EXPECT_EQ(beside.response.text(), alone.text());
  WaitUntilNothingRuns();
}

TEST_F(EndToEnd, ConcurrentStreamsSayWhatEachSaysAlone) {
  constexpr int kStreams = 16;
  std::vector<v1::GenerateRequest> requests;
  std::vector<std::string> alone;
  for (int i = 0; i < kStreams; ++i) {
    v1::GenerateRequest request = Request(10 + 9 * i, std::string(kPrompt).substr(0, 2 + i));
    request.mutable_sampling()->set_temperature(i % 3 == 0 ? 0.0f : 0.8f);
    request.mutable_sampling()->set_seed(1000 + i);
    requests.push_back(request);
    v1::GenerateResponse response;
    ASSERT_TRUE(Generate(request, &response).ok());
    alone.push_back(response.text());
  }
  std::vector<Streamed> together(kStreams);
  std::vector<std::thread> clients;
  for (int i = 0; i < kStreams; ++i) {
    clients.emplace_back([&, i] { together[i] = Stream(stub_.get(), requests[i]); });
  }
  for (std::thread& client : clients) client.join();
  for (int i = 0; i < kStreams; ++i) {
    EXPECT_TRUE(together[i].status.ok());
    EXPECT_EQ(together[i].response.text(), alone[i]) << i;
  }
  WaitUntilNothingRuns();
}

TEST_F(EndToEnd, ACancelledStreamFreesItsBlocks) {
  for (int tokens_before : {0, 1, 5}) {
    grpc::ClientContext context;
    const auto reader = stub_->GenerateStream(&context, Request(kLong));
    v1::GenerateChunk chunk;
    for (int seen = 0; seen < tokens_before && reader->Read(&chunk);) seen += chunk.token_ids_size();
    context.TryCancel();
    while (reader->Read(&chunk)) {
    }
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
    WaitUntilNothingRuns();
  }
}

TEST_F(EndToEnd, SurvivesCancellationsAtRandomMoments) {
  std::vector<std::thread> clients;
  for (int c = 0; c < 4; ++c) {
    clients.emplace_back([this, c] {
      std::mt19937 random(c);
      for (int i = 0; i < 50; ++i) {
        grpc::ClientContext context;
        const auto reader = stub_->GenerateStream(&context, Request(kLong));
        v1::GenerateChunk chunk;
        const int chunks = static_cast<int>(random() % 6);
        for (int seen = 0; seen < chunks && reader->Read(&chunk); ++seen) {
        }
        context.TryCancel();
        while (reader->Read(&chunk)) {
        }
        reader->Finish();
      }
    });
  }
  for (std::thread& client : clients) client.join();
  WaitUntilNothingRuns();
  v1::GenerateResponse response;
  EXPECT_TRUE(Generate(Request(4), &response).ok());
}

TEST_F(EndToEnd, ADeadlineEndsAStream) {
  {
    const Brake brake;
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + milliseconds(30));
    const Streamed streamed = ReadAll(stub_->GenerateStream(&context, Request(kLong)).get());
    EXPECT_EQ(streamed.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  }
  WaitUntilNothingRuns();
}

TEST_F(EndToEnd, AbortEndsTheStreamOfThatId) {
  v1::GenerateRequest request = Request(kLong);
  request.set_request_id("to-be-aborted");
  std::optional<Brake> brake(std::in_place);
  grpc::ClientContext context;
  const auto reader = stub_->GenerateStream(&context, request);
  v1::GenerateChunk chunk;
  ASSERT_TRUE(reader->Read(&chunk));

  grpc::ClientContext second_context;
  const auto second = stub_->GenerateStream(&second_context, request);
  const grpc::Status duplicate = ReadAll(second.get()).status;
  EXPECT_EQ(duplicate.error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_TRUE(HasDetail(duplicate, "ErrorInfo"));

  grpc::ClientContext abort_context;
  v1::AbortRequest abort;
  abort.set_request_id("to-be-aborted");
  v1::AbortResponse aborted;
  ASSERT_TRUE(stub_->Abort(&abort_context, abort, &aborted).ok());
  EXPECT_TRUE(aborted.found());
  while (reader->Read(&chunk)) {
  }
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_THAT(status.error_message(), HasSubstr("aborted"));
  brake.reset();
  WaitUntilNothingRuns();
}

TEST_F(EndToEnd, ASlowReaderHurtsOnlyItself) {
  ServerOptions options;
  options.max_outbox_bytes = 8 << 10;
  Start(options);
  v1::GenerateResponse alone;
  ASSERT_TRUE(Generate(Request(100), &alone).ok());

  // 480 tokens with 100 alternatives each are about 570 KB; the client takes 64 KiB without being asked.
  v1::GenerateRequest large = Request(kLong);
  large.mutable_output()->set_top_logprobs(100);
  const auto slow_stub = v1::GenerationService::NewStub(Channel());
  grpc::ClientContext context;
  const auto slow = slow_stub->GenerateStream(&context, large);
  slow->WaitForInitialMetadata();  // it has begun
  const Streamed beside = Stream(stub_.get(), Request(100));
  EXPECT_TRUE(beside.status.ok());
  EXPECT_EQ(beside.response.text(), alone.text());
  WaitUntilNothingRuns();

  const Streamed streamed = ReadAll(slow.get());
  EXPECT_EQ(streamed.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(streamed.status.error_message(), HasSubstr("reads too slowly"));
  EXPECT_GT(streamed.response.token_ids_size(), 0);
  EXPECT_LT(streamed.response.token_ids_size(), static_cast<int>(kLong));
}

TEST_F(EndToEnd, DrainsRunningStreamsToTheirEnd) {
  constexpr uint32_t kTokens = 200;
  ServerOptions options;
  options.drain_timeout_s = 3600;  // sanitizers are slow
  Start(options);
  grpc::ClientContext watch_context;
  HealthCheckResponse health;
  const auto health_stub = grpc::health::v1::Health::NewStub(Channel());
  const auto watch = health_stub->Watch(&watch_context, HealthCheckRequest());
  ASSERT_TRUE(watch->Read(&health));
  EXPECT_EQ(health.status(), HealthCheckResponse::SERVING);

  constexpr int kStreams = 4;
  std::atomic<int> started{0};
  std::vector<Streamed> streams(kStreams);
  std::vector<std::thread> clients;
  for (int i = 0; i < kStreams; ++i) {
    clients.emplace_back([&, i] {
      const auto stub = v1::GenerationService::NewStub(Channel());
      grpc::ClientContext context;
      const auto reader = stub->GenerateStream(&context, Request(kTokens));
      reader->WaitForInitialMetadata();  // comes with the first chunk
      ++started;
      streams[i] = ReadAll(reader.get());
    });
  }
  while (started < kStreams) std::this_thread::yield();
  bool complete = false;
  std::thread drain([&] { complete = server_->Drain(); });
  ASSERT_TRUE(watch->Read(&health));
  EXPECT_EQ(health.status(), HealthCheckResponse::NOT_SERVING);
  grpc::Status refused;
  v1::GenerateResponse response;
  while ((refused = Generate(Request(1), &response)).ok()) std::this_thread::yield();
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::UNAVAILABLE);
  for (std::thread& client : clients) client.join();
  drain.join();
  EXPECT_TRUE(complete);
  for (const Streamed& stream : streams) {
    EXPECT_TRUE(stream.status.ok()) << stream.status.error_message();
    EXPECT_EQ(stream.response.token_ids_size(), static_cast<int>(kTokens));
  }
}

TEST_F(EndToEnd, ADrainThatRunsOutOfTimeEndsTheRestWithUnavailable) {
  ServerOptions options;
  options.drain_timeout_s = 0;
  Start(options);
  const Brake brake;
  grpc::ClientContext context;
  const auto reader = stub_->GenerateStream(&context, Request(kLong));
  v1::GenerateChunk chunk;
  ASSERT_TRUE(reader->Read(&chunk));
  EXPECT_FALSE(server_->Drain());
  while (reader->Read(&chunk)) {
  }
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(HasDetail(status, "RetryInfo"));
  EXPECT_TRUE(engine_->WaitIdle(std::chrono::steady_clock::now() + std::chrono::minutes(1)));
}

}  // namespace
}  // namespace dejavu
