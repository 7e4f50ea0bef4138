// How calls of a whole daemon end before their time: by the client, a deadline, Abort, a slow reader, a drain.
#include <atomic>
#include <chrono>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/server/end_to_end.h"
#include "tests/server/raw_call.h"

namespace dejavu {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using std::chrono::milliseconds;
using testing::HasSubstr;

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
  options.max_outbox_bytes = 64 << 10;
  Start(options);
  v1::GenerateResponse alone;
  ASSERT_TRUE(Generate(Request(100), &alone).ok());

  // 480 tokens with 100 alternatives each are about 570 KB; the client takes 64 KiB without being asked.
  v1::GenerateRequest large = Request(kLong);
  large.mutable_output()->set_top_logprobs(100);
  const auto slow_stub = v1::GenerationService::NewStub(Channel());
  grpc::ClientContext context;
  const auto slow = slow_stub->GenerateStream(&context, large);
  {  // it has begun: some of it has been read before more comes than the outbox holds
    const Brake brake;
    v1::GenerateChunk chunk;
    while (chunk.token_ids().empty()) ASSERT_TRUE(slow->Read(&chunk));
  }
  const Streamed beside = Stream(stub_.get(), Request(100));
  EXPECT_TRUE(beside.status.ok());
  EXPECT_EQ(beside.response.text(), alone.text());
  WaitUntilNothingRuns();

  v1::GenerateChunk rest;
  int tokens = 0;
  while (slow->Read(&rest)) tokens += rest.token_ids_size();
  const grpc::Status status = slow->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("reads too slowly"));
  EXPECT_LT(tokens, static_cast<int>(kLong) - 1);
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
