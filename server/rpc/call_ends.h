// CallEnds: where calls report their end. It knows the observers, and outlives the server where a call's last word
// comes from an engine that does. Any thread.
#ifndef SERVER_RPC_CALL_ENDS_H_
#define SERVER_RPC_CALL_ENDS_H_

#include <memory>
#include <utility>
#include <vector>

#include "kernels/base/mutex.h"
#include "server/rpc/request_record.h"
#include "server/rpc/writer.h"

namespace dejavu {

class CallEnds {
 public:
  // `trace_ratio`: trace.sample_ratio, for the calls' contexts.
  CallEnds(Writer* writer, double trace_ratio) : trace_ratio_(trace_ratio), writer_(writer) {}

  // Before the server starts. The observers must outlive Close.
  void Add(RequestObserver* observer) { observers_.push_back(observer); }

  double trace_ratio() const { return trace_ratio_; }

  void Report(const RequestRecord& record) const {
    for (RequestObserver* observer : observers_) observer->OnRequestEnd(record);
  }

  // A call that is over while the engine still has its request: `task` will come later, by Post.
  void Expect();
  // Runs `task` in the writer's thread. False once closed: nothing will run. From the engine's thread too.
  bool Post(std::shared_ptr<WriterTask> task);
  // Of one that was expected. Nobody hears of it once closed.
  void ReportLate(const RequestRecord& record);

  // Waits for those that are expected, at most until `deadline`; what comes later is lost. Before the writer goes.
  void Close(SteadyTime deadline);

 private:
  const double trace_ratio_;
  std::vector<RequestObserver*> observers_;  // constant once the server runs

  Mutex mutex_;
  CondVar idle_;
  Writer* writer_ ABSL_GUARDED_BY(mutex_);  // null: closed
  int expected_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace dejavu

#endif  // SERVER_RPC_CALL_ENDS_H_
