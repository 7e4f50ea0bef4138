// AdminService: the methods of dejavu.v1.AdminService, for operators, on a listener of its own. Those that are more
// than a few lines have files of their own in this folder. Any thread.
#ifndef SERVER_API_ADMIN_SERVICE_H_
#define SERVER_API_ADMIN_SERVICE_H_

#include <atomic>
#include <functional>

#include "absl/status/status.h"
#include "dejavu/v1/admin.pb.h"
#include "server/api/errands.h"
#include "server/api/serving_state.h"
#include "server/rpc/dispatcher.h"

namespace dejavu {

class AdminService {
 public:
  // `drain` asks for what SIGTERM does and returns at once; empty: Drain is UNIMPLEMENTED. `state` must outlive the
  // object.
  AdminService(ServingState* state, std::function<void()> drain);

  void Register(Dispatcher* dispatcher);

  // Ends what waits, with UNAVAILABLE.
  void Stop() { errands_.Stop(); }

 private:
  static absl::Status Drain(AdminService& service, const v1::DrainRequest& request, v1::DrainResponse* response);

  ServingState* const state_;
  const std::function<void()> drain_;
  std::atomic<bool> drain_asked_{false};
  Errands errands_;  // what waits for the engine
};

}  // namespace dejavu

#endif  // SERVER_API_ADMIN_SERVICE_H_
