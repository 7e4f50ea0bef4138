// Health: grpc.health.v1, Check and Watch. "" and "dejavu.v1.GenerationService" tell readiness: serving only while the
// server takes new requests and can be connected to. "liveness" is serving from the first moment until the engine has
// failed. Any thread.
#ifndef SERVER_API_HEALTH_H_
#define SERVER_API_HEALTH_H_

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "grpc/health/v1/health.pb.h"
#include "kernels/base/mutex.h"
#include "server/rpc/dispatcher.h"
#include "server/rpc/lifecycle.h"

namespace dejavu {

class Health {
 public:
  // Follows the lifecycle from now on; both live until no call is left.
  explicit Health(Lifecycle* lifecycle);

  // Whether clients can connect to the port that this health is of. True at first.
  void SetReachable(bool reachable);

  void Register(Dispatcher* dispatcher);

  // SERVICE_UNKNOWN for names that do not exist.
  grpc::health::v1::HealthCheckResponse::ServingStatus Status(const std::string& service) const;

  // For the Watch handler: `rpc` is woken at every change.
  void AddWatcher(const std::shared_ptr<Rpc>& rpc);
  Phase phase() const { return lifecycle_->phase(); }

 private:
  void WakeWatchers();

  Lifecycle* const lifecycle_;
  std::atomic<bool> reachable_{true};
  Mutex mutex_;
  std::vector<std::weak_ptr<Rpc>> watchers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // SERVER_API_HEALTH_H_
