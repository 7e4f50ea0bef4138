// AdminService: the methods of dejavu.v1.AdminService, for operators, on a listener of its own. Any thread. What waits
// for the engine runs one after the other in a thread of the service.
#ifndef SERVER_API_ADMIN_SERVICE_H_
#define SERVER_API_ADMIN_SERVICE_H_

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <thread>

#include "absl/status/status.h"
#include "dejavu/v1/admin.pb.h"
#include "engine/request.h"
#include "kernels/base/mutex.h"
#include "server/api/generation_service.h"
#include "server/rpc/dispatcher.h"
#include "server/rpc/lifecycle.h"

namespace dejavu {

class AdminService {
 public:
  static constexpr char kName[] = "dejavu.v1.AdminService";

  // `drain` asks for what SIGTERM does and returns at once; empty: Drain is UNIMPLEMENTED.
  AdminService(GenerationService* generation, const Lifecycle* lifecycle, std::function<void()> drain);
  ~AdminService();
  AdminService(const AdminService&) = delete;
  AdminService& operator=(const AdminService&) = delete;

  void Register(Dispatcher* dispatcher);

  // Ends what waits, with UNAVAILABLE.
  void Stop();

 private:
  // What a call that waits for the engine has done; it may outlive the call.
  struct Errand {
    std::function<void()> run;
    std::atomic<bool> cancelled{false};  // the client has gone
  };
  template <typename Request, typename Response>
  class ErrandCall;

  // False: stopped, it will not run.
  bool Post(std::shared_ptr<Errand> errand);
  void RunErrands();
  // False once the errand is not wanted any more; else after `time`, or sooner.
  bool Pause(const Errand& errand, SteadyTime::duration time);

  absl::Status GetEngineState(v1::GetEngineStateResponse* response) const;
  absl::Status Drain(v1::DrainResponse* response);
  absl::Status SetDefaultTier(const v1::SetDefaultTierRequest& request, v1::SetDefaultTierResponse* response);
  absl::Status DumpTrace(v1::DumpTraceResponse* response) const;
  absl::Status ReloadPredictor(v1::ReloadPredictorResponse* response);
  absl::Status Profile(const v1::ProfileRequest& request, const Errand& errand, v1::ProfileResponse* response);

  GenerationService* const generation_;
  const Lifecycle* const lifecycle_;
  const std::function<void()> drain_;
  const SteadyTime started_;
  std::atomic<bool> drain_asked_{false};

  Mutex mutex_;
  CondVar changed_;
  std::deque<std::shared_ptr<Errand>> errands_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace dejavu

#endif  // SERVER_API_ADMIN_SERVICE_H_
