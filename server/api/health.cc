#include "server/api/health.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/api/service_names.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"

namespace dejavu {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

// Sends the status at once and again after each change; changes that the client was too slow for are skipped.
class WatchCall final : public RpcHandler {
 public:
  explicit WatchCall(Health* health) : health_(health) {}

  absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) override {
    RETURN_IF_ERROR(ParseMessage(bytes, &request_));
    health_->AddWatcher(rpc);
    return absl::OkStatus();
  }

  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override {
    if (health_->phase() == Phase::kStopped) *end = ServerStopped();
    const HealthCheckResponse::ServingStatus status = health_->Status(request_.service());
    if (sent_ && status == reply_.status()) return nullptr;
    sent_ = true;
    reply_.set_status(status);
    return &reply_;
  }

 private:
  Health* const health_;
  HealthCheckRequest request_;
  HealthCheckResponse reply_;
  bool sent_ = false;
};

}  // namespace

Health::Health(Lifecycle* lifecycle) : lifecycle_(lifecycle) {
  lifecycle->AddListener([this](Phase) { WakeWatchers(); });
}

void Health::Register(Dispatcher* dispatcher) {
  const std::string name = kHealthService;
  const Needs nothing = {Caller::kAnybody, Resource::kNone};
  dispatcher->RegisterUnary<HealthCheckRequest, HealthCheckResponse>(
      name, "Check", nothing, [this](const Rpc&, const HealthCheckRequest& request, HealthCheckResponse* response) {
        response->set_status(Status(request.service()));
        if (response->status() != HealthCheckResponse::SERVICE_UNKNOWN) return absl::OkStatus();
        return absl::NotFoundError(absl::StrCat("no health is kept for service ", Printable(request.service(), 200)));
      });
  dispatcher->Register(name, "Watch", nothing, [this] { return std::make_unique<WatchCall>(this); });
}

HealthCheckResponse::ServingStatus Health::Status(const std::string& service) const {
  const Phase phase = lifecycle_->phase();
  const auto serving_if = [](bool condition) {
    return condition ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
  };
  if (service == "liveness") return serving_if(phase != Phase::kFailed);
  if (service.empty() || service == kGenerationService) return serving_if(phase == Phase::kServing && reachable_);
  return HealthCheckResponse::SERVICE_UNKNOWN;
}

void Health::SetReachable(bool reachable) {
  if (reachable_.exchange(reachable) != reachable) WakeWatchers();
}

void Health::AddWatcher(const std::shared_ptr<Rpc>& rpc) {
  MutexLock lock(mutex_);
  watchers_.erase(std::remove_if(watchers_.begin(), watchers_.end(), [](const auto& w) { return w.expired(); }),
                  watchers_.end());
  watchers_.push_back(rpc);
}

void Health::WakeWatchers() {
  MutexLock lock(mutex_);
  for (const auto& watcher : watchers_) {
    if (const std::shared_ptr<Rpc> rpc = watcher.lock()) rpc->Wake();
  }
}

}  // namespace dejavu
