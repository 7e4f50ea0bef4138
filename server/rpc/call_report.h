// CallReport: tells the observers of a call's end (RequestObserver), once. Where the engine still works for a call that
// is over, the report comes later, from the writer's thread. It outlives its Rpc's part in gRPC, and perhaps the
// server. Any thread.
#ifndef SERVER_RPC_CALL_REPORT_H_
#define SERVER_RPC_CALL_REPORT_H_

#include <memory>
#include <string>
#include <utility>

#include "grpcpp/support/status_code_enum.h"
#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"
#include "server/rpc/call_ends.h"
#include "server/rpc/request_record.h"
#include "server/rpc/writer.h"

namespace dejavu {

// What a handler knows of its call. It may outlive the handler.
class RecordSource {
 public:
  virtual ~RecordSource() = default;
  // False while the engine still works for the call: Rpc::Wake says when to ask again. Any thread but the engine's.
  virtual bool Fill(RequestRecord* record) = 0;
};

class CallReport final : public WriterTask, public std::enable_shared_from_this<CallReport> {
 public:
  // `record` holds what is known of a call when it arrives.
  CallReport(std::shared_ptr<CallEnds> ends, RequestRecord record)
      : ends_(std::move(ends)), record_(std::move(record)) {}

  // As they were at the arrival.
  SteadyTime arrival() const { return record_.arrival; }
  const std::string& tenant() const { return record_.tenant; }

  // The call is over, with that code: reports it, or waits for what `source` lacks. Null: it adds nothing.
  void EndCall(grpc::StatusCode code, SteadyTime::duration client_stall, std::shared_ptr<RecordSource> source);

  // The same call as far as it was known when it arrived, for one of its requests. Before EndCall.
  std::shared_ptr<CallReport> OfRequest(SteadyTime arrival) const;

  // `source` may know more now. Nothing while the call is not over. The engine's thread, too.
  void Wake();

 private:
  void RunInWriter() override;
  // Reports the call unless its source lacks something; then a Wake leads here again.
  void Report();

  const std::shared_ptr<CallEnds> ends_;
  RequestRecord record_;  // changed after EndCall only, by one thread at a time

  Mutex mutex_;
  std::shared_ptr<RecordSource> source_ ABSL_GUARDED_BY(mutex_);  // from EndCall until the report has what it needs
  bool queued_ ABSL_GUARDED_BY(mutex_) = false;                   // in the writer's queue
  bool expected_ ABSL_GUARDED_BY(mutex_) = false;                 // `ends_` has been told that the report comes late
  bool reported_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace dejavu

#endif  // SERVER_RPC_CALL_REPORT_H_
