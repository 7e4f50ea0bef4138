// Errands: a thread that runs, one after the other, what calls wait for and what takes longer than one of gRPC's
// threads may be held. ErrandCall is such a call. Any thread.
#ifndef SERVER_API_ERRANDS_H_
#define SERVER_API_ERRANDS_H_

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"
#include "server/rpc/rpc.h"

namespace dejavu {

class Errands {
 public:
  // What a call waits for; it may outlive the call.
  struct Errand {
    std::function<void()> run;
    std::atomic<bool> cancelled{false};  // the client has gone
  };

  Errands() : thread_([this] { Run(); }) {}
  ~Errands();
  Errands(const Errands&) = delete;
  Errands& operator=(const Errands&) = delete;

  // False: stopped, it will not run.
  bool Post(std::shared_ptr<Errand> errand);

  // For a running errand. False once it is not wanted any more; else after `time`, or sooner.
  bool Pause(const Errand& errand, SteadyTime::duration time);

  // From now on nothing is wanted. What was posted still runs, and ends at its first pause.
  void Stop();

 private:
  void Run();

  Mutex mutex_;
  CondVar changed_;
  std::deque<std::shared_ptr<Errand>> errands_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// Errands::Pause of the errand that runs.
using PauseFunction = absl::FunctionRef<bool(SteadyTime::duration)>;

// A method with one request and one reply, answered by an errand.
template <typename Request, typename Response>
class ErrandCall final : public RpcHandler {
 public:
  using Function = std::function<absl::Status(const Request&, PauseFunction, Response*)>;
  ErrandCall(Errands* errands, Function function) : errands_(errands), function_(std::move(function)) {}

  absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) override {
    RETURN_IF_ERROR(ParseMessage(bytes, &work_->request));
    work_->run = [rpc, errands = errands_, function = function_, work = work_.get()] {
      const auto pause = [errands, work](SteadyTime::duration time) { return errands->Pause(*work, time); };
      work->status = function(work->request, pause, &work->response);
      work->done.store(true, std::memory_order_release);
      rpc->Wake();
    };
    return errands_->Post(work_) ? absl::OkStatus() : ServerStopped();
  }

  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override {
    if (!work_->done.load(std::memory_order_acquire)) return nullptr;
    *end = work_->status;
    return work_->status.ok() ? &work_->response : nullptr;
  }

  void OnCancel() override { work_->cancelled = true; }

 private:
  // The call and its errand share it: either may be gone first.
  struct Work : Errands::Errand {
    Request request;
    Response response;  // as the next, constant once `done`
    absl::Status status;
    std::atomic<bool> done{false};
  };

  Errands* const errands_;
  const Function function_;
  const std::shared_ptr<Work> work_ = std::make_shared<Work>();
};

// A call that is answered by a function of `object`, which must outlive the errands.
template <typename Object, typename Taken, typename Request, typename Response>
std::unique_ptr<RpcHandler> MakeErrandCall(Errands* errands, Object* object,
                                           absl::Status (*function)(Taken&, const Request&, PauseFunction, Response*)) {
  return std::make_unique<ErrandCall<Request, Response>>(
      errands, [object, function](const Request& request, PauseFunction pause, Response* response) {
        return function(*object, request, pause, response);
      });
}

}  // namespace dejavu

#endif  // SERVER_API_ERRANDS_H_
