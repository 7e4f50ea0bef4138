#include "loadtest/generator/echo.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>

#include "absl/strings/str_cat.h"
#include "dejavu/v1/generation.grpc.pb.h"
#include "grpcpp/alarm.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

using Clock = std::chrono::system_clock;

constexpr uint32_t kVocabulary = 1000;
constexpr uint32_t kContext = 1 << 20;
constexpr uint32_t kToken = 5;

class EchoStream final : public grpc::ServerWriteReactor<v1::GenerateChunk> {
 public:
  EchoStream(const v1::GenerateRequest& request, double itl_ms)
      : left_(std::max<uint32_t>(1, request.stopping().max_new_tokens())),
        all_(left_),
        gap_(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double, std::milli>(itl_ms))) {
    v1::PromptInfo& prompt = *chunk_.mutable_prompt();
    prompt.set_prompt_tokens(static_cast<uint32_t>(request.token_ids().ids_size()));
    prompt.set_max_new_tokens(all_);
    prompt.set_tier(v1::TIER_DENSE);
    next_ = Clock::now();
    WriteNext();
  }

  void OnWriteDone(bool ok) override {
    if (!ok || left_ == 0) {
      Finish(grpc::Status::OK);
      return;
    }
    next_ += gap_;
    alarm_ = std::make_unique<grpc::Alarm>();
    alarm_->Set(next_, [this](bool /*expired*/) { WriteNext(); });
  }
  void OnDone() override { delete this; }

 private:
  void WriteNext() {
    const uint32_t count = gap_ == Clock::duration::zero() ? left_ : 1;
    chunk_.mutable_token_ids()->Resize(static_cast<int>(count), kToken);
    left_ -= count;
    if (left_ == 0) {
      v1::Finish& finish = *chunk_.mutable_finish();
      finish.set_reason(v1::FINISH_REASON_LENGTH);
      finish.set_generated_tokens(all_);
    }
    sent_.Swap(&chunk_);
    chunk_.Clear();
    StartWrite(&sent_);
  }

  uint32_t left_;
  const uint32_t all_;
  const Clock::duration gap_;
  Clock::time_point next_;
  v1::GenerateChunk chunk_, sent_;
  std::unique_ptr<grpc::Alarm> alarm_;
};

class Echo final : public v1::GenerationService::CallbackService {
 public:
  explicit Echo(double itl_ms) : itl_ms_(itl_ms) {}

  grpc::ServerWriteReactor<v1::GenerateChunk>* GenerateStream(grpc::CallbackServerContext* /*context*/,
                                                              const v1::GenerateRequest* request) override {
    return new EchoStream(*request, itl_ms_);
  }
  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context, const v1::GetServerInfoRequest*,
                                          v1::GetServerInfoResponse* reply) override {
    reply->set_state(v1::SERVER_STATE_SERVING);
    reply->set_model("echo");
    reply->set_backend("echo");
    return Done(context);
  }
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context, const v1::GetModelInfoRequest*,
                                         v1::GetModelInfoResponse* reply) override {
    reply->set_model("echo");
    reply->set_vocabulary_size(kVocabulary);
    reply->set_context_tokens(kContext);
    return Done(context);
  }

 private:
  static grpc::ServerUnaryReactor* Done(grpc::CallbackServerContext* context) {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  const double itl_ms_;
};

// Whole or not at all.
absl::Status WritePort(const std::string& path, int port) {
  const std::string temporary = absl::StrCat(path, ".new");
  std::FILE* const file = std::fopen(temporary.c_str(), "w");
  if (file == nullptr) return absl::UnknownError(absl::StrCat("cannot write ", temporary));
  std::fprintf(file, "%d\n", port);
  if (std::fclose(file) == 0 && std::rename(temporary.c_str(), path.c_str()) == 0) return absl::OkStatus();
  return absl::UnknownError(absl::StrCat("cannot write ", path));
}

}  // namespace

absl::Status RunEcho(const EchoOptions& options, const std::atomic<bool>& interrupted) {
  Echo service(options.itl_ms);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(options.listen, grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  grpc::EnableDefaultHealthCheckService(true);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || port == 0) return absl::UnavailableError(absl::StrCat("cannot listen on ", options.listen));
  // Our service config asks for it by this name.
  server->GetHealthCheckService()->SetServingStatus(v1::GenerationService::service_full_name(), true);
  if (!options.port_file.empty()) RETURN_IF_ERROR(WritePort(options.port_file, port));
  while (!interrupted.load()) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  server->Shutdown(Clock::now());
  return absl::OkStatus();
}

}  // namespace dejavu
