// EngineCall: a call that the engine works on. It hands the request over, sends what the sinks of its samples have to
// say, can be stopped by the request's id, and keeps what the call's record needs. What is particular to a method is in
// the classes that derive from it: GenerateCall, ScoreCall. Threads as RpcHandler says; Stop from any.
//
// The request's id is free again before the client hears of the end. A client that has given up hears nothing, and may
// come again before we know: whoever finds the id taken therefore waits a moment before it is told so.
#ifndef SERVER_API_ENGINE_CALL_H_
#define SERVER_API_ENGINE_CALL_H_

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/request.h"
#include "grpcpp/alarm.h"
#include "kernels/base/mutex.h"
#include "server/api/engine_record.h"
#include "server/api/reply_sink.h"
#include "server/api/serving_state.h"
#include "server/rpc/live_requests.h"
#include "server/rpc/rpc.h"

namespace dejavu {

// One request of a client, as the engine's calls see it: a whole call, or one of those that a stream carries.
struct Asking {
  std::shared_ptr<Rpc> rpc;
  SteadyTime arrival;
  std::shared_ptr<CallReport> report;  // of this request alone; null: the call's own

  // As Rpc::Wake.
  void Wake() const {
    rpc->Wake();
    if (report != nullptr) report->Wake();
  }
};

class EngineCall : public RpcHandler, public LiveRequest {
 public:
  explicit EngineCall(ServingState* state) : state_(*state) {}
  ~EngineCall() override;

  absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) final {
    return OnRequest({rpc, rpc->arrival(), nullptr}, bytes);
  }
  absl::Status OnRequest(const Asking& asking, const grpc::ByteBuffer& bytes);

  // What any sink has to say. The call ends with the last of them, or with the first that fails.
  google::protobuf::MessageLite* NextSinkReply(std::optional<absl::Status>* end);
  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override {
    return NextSinkReply(end);
  }

  void ReleaseReply() override;

  void OnCancel() override;

  std::shared_ptr<RecordSource> record_source() override { return record_; }

  std::string load_report(const std::string& tenant) override;

  void Stop(const absl::Status& reason) override;

 protected:
  // The method's part of OnRequest, which ends with Submit.
  virtual absl::Status Read(const Asking& asking, const grpc::ByteBuffer& bytes) = 0;

  // Of a request that has been parsed: its id, or one that is drawn. The checks come after it.
  template <typename ProtoRequest>
  void Note(const ProtoRequest& request) {
    NoteAsked(request.request_id(), request.text());
  }

  // The last that Read does. A sink for each sample of each prompt, in order; their first reply may be pulled as soon
  // as this has returned OK. The refusals of the engine are passed on as they are. `most_tokens`: what it may take of
  // the tenant's quota. The call's deadline holds beside the request's own.
  absl::Status Submit(std::vector<Request> prompts, int64_t most_tokens, std::vector<std::shared_ptr<ReplySink>> sinks,
                      const std::shared_ptr<Rpc>& rpc);

  ServingState& state() const { return state_; }
  RequestAsked& asked() { return record_->asked; }  // until Submit

 private:
  // A request whose id another one has.
  struct Waiting {
    std::vector<Request> prompts;
    std::weak_ptr<Rpc> rpc;
    SteadyTime until;
    bool timed = false;
    grpc::Alarm alarm;  // at `until`
  };

  // The call ends with that before the engine has it: counts it, unless the engine has.
  void CountRefused(const absl::Status& status);
  void NoteAsked(const std::string& request_id, absl::string_view text);
  absl::Status TakeId(const std::shared_ptr<Rpc>& rpc);
  absl::Status TakeQuota();
  absl::StatusOr<std::vector<uint64_t>> Begin(std::vector<Request> prompts);
  absl::StatusOr<std::vector<uint64_t>> SubmitAll(std::vector<Request> prompts);
  absl::Status HandOver(std::vector<Request> prompts);
  // True: it waits no more. An error: the call's end.
  absl::StatusOr<bool> EndWaiting();
  // The id is free, and the place among the tenant's concurrent requests.
  void Release();
  // Of a status that the call ends with: whether balancing load should hear of it.
  void NoteEnd(const absl::Status& status);
  // Beside OnRequest, possibly before the engine has given an id.
  void StopEngine();
  void CancelAll() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  ServingState& state_;
  const std::shared_ptr<EngineRecord> record_ = std::make_shared<EngineRecord>();

  std::vector<std::shared_ptr<ReplySink>> sinks_;  // set in OnRequest
  std::vector<bool> ended_;                        // which of them; NextReply's, as the next
  size_t ends_ = 0;
  // Set in OnRequest, before `entered_` says so: OnCancel may run beside it.
  RequestKey key_;
  std::string tenant_;
  int64_t most_tokens_ = 0;
  std::atomic<bool> entered_{false};  // the server waits for this call's end
  std::optional<Waiting> waiting_;    // OnRequest's, and after it NextReply's
  std::atomic<bool> released_{false};

  Mutex mutex_;
  std::vector<uint64_t> engine_ids_ ABSL_GUARDED_BY(mutex_);  // of each sink; empty: not submitted
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  LoadMeter::Stay stay_ ABSL_GUARDED_BY(mutex_);
  QuotaLease* lease_ ABSL_GUARDED_BY(mutex_) = nullptr;  // the record's
};

}  // namespace dejavu

#endif  // SERVER_API_ENGINE_CALL_H_
