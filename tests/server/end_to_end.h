// The real server with the real engine and the embedded model, through a real gRPC client.
#ifndef TESTS_SERVER_END_TO_END_H_
#define TESTS_SERVER_END_TO_END_H_

#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "dejavu/v1/generation.grpc.pb.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "server/server.h"
#include "tests/engine/serving/collecting_sink.h"

namespace dejavu {

inline constexpr char kPrompt[] = "It was a dark night and";
inline constexpr uint32_t kLong = 480;  // tokens; with the prompt it fits the context of 512

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
    options.speculation_mode = "off";  // how many steps a text takes must not hang on how quick the machine is
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
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        return true;
      });
      id_ = engine_->Submit(request, sink).value();
      sink->WaitForTokens(1);
    }
    ~Brake() { engine_->Cancel(id_); }

   private:
    uint64_t id_;
  };

  inline static const Tokenizer* tokenizer_ = nullptr;
  inline static Engine* engine_ = nullptr;
  std::unique_ptr<Server> server_;
  std::unique_ptr<v1::GenerationService::Stub> stub_;
};

}  // namespace dejavu

#endif  // TESTS_SERVER_END_TO_END_H_
