// Rpc: one call of one method on the wire, from its first byte to its last. It hides gRPC's reactor: reads the request
// (or requests), has exactly one write outstanding, ends the call once, and says when the client has gone. RpcHandler
// is the method's part. Replies are pulled: whenever a write may be issued, the handler is asked for the next one, so
// that what a slow client has not read yet stays with the handler, which can merge it. What observers hear of the call
// is CallReport's part.
#ifndef SERVER_RPC_RPC_H_
#define SERVER_RPC_RPC_H_

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "engine/request.h"
#include "google/protobuf/message.h"
#include "grpcpp/generic/async_generic_service.h"
#include "kernels/base/mutex.h"
#include "server/rpc/call_ends.h"
#include "server/rpc/call_report.h"
#include "server/rpc/call_slot.h"
#include "server/rpc/open_calls.h"
#include "server/rpc/parse.h"
#include "server/rpc/request_record.h"
#include "server/rpc/work_pool.h"
#include "server/rpc/writer.h"

namespace dejavu {

class Rpc;

// What all calls share; it outlives them.
struct RpcWorkers {
  Writer* writer;
  WorkPool* pool;
  OpenCalls* calls;
};

// Destroyed when the call is over and no callback runs any more.
class RpcHandler {
 public:
  virtual ~RpcHandler() = default;

  // A request: exactly one, unless the method streams requests. An error ends the call with it. From one of gRPC's
  // threads, or the pool's where it is large.
  virtual absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) = 0;

  // The next reply, valid until the next call, or null when there is none now. With the last one, or alone, `end` is
  // set. From the writer's or one of gRPC's threads, never two at once; first after OnRequest or a Wake that it led to.
  virtual const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) = 0;

  // The client has gone or the deadline has passed; nothing that is still sent arrives. May run beside the others.
  virtual void OnCancel() {}

  // The last reply has been serialised: what the handler holds of it can go. As NextReply.
  virtual void ReleaseReply() {}

  // True: a further request is read after each reply, and the client's half-close ends the call.
  virtual bool streams_requests() const { return false; }

  // True: requests are read as they come, as long as TakesMore, which is asked after each request and each reply. The
  // handler ends the call, sometime after it has heard of the client's half-close. From any of gRPC's threads.
  virtual bool reads_ahead() const { return false; }
  virtual bool TakesMore() { return true; }
  virtual void OnHalfClose() {}

  // The call is over, with that code. The last that is heard; nothing runs beside it.
  virtual void OnEnd(grpc::StatusCode /*code*/) {}

  // True: replies may be large, and are made and serialised by the pool. Asked by whoever says that there is one.
  virtual bool large_replies() const { return false; }

  // For the trailers, as ORCA has it: asked for when the handler has ended the call. Empty: none.
  virtual std::string load_report(const std::string& /*tenant*/) { return {}; }

  // Asked for when the call is over. Null: there is nothing to add to what the call itself knows.
  virtual std::shared_ptr<RecordSource> record_source() { return nullptr; }
};

class Rpc final : public grpc::ServerGenericBidiReactor, public WriterTask, public std::enable_shared_from_this<Rpc> {
 public:
  ~Rpc() override;

  // Answers a call without looking at it further, and reports it.
  static grpc::ServerGenericBidiReactor* Refuse(grpc::CallbackServerContext* context, const absl::Status& status,
                                                RequestRecord record, const CallEnds& ends);
  // `record` holds what Describe says.
  static grpc::ServerGenericBidiReactor* Start(grpc::CallbackServerContext* context, const RpcWorkers& workers,
                                               std::unique_ptr<CallSlot> slot, std::shared_ptr<CallEnds> ends,
                                               RequestRecord record, std::unique_ptr<RpcHandler> handler);

  // What is known of a call when it arrives: now.
  static RequestRecord Describe(const grpc::CallbackServerContext& context, double trace_ratio);

  // Tells that the handler, or what it has left to the report, has something new. Any thread, the engine's too: the
  // work is another one's.
  void Wake();

  // Ends the call where its client keeps it waiting, with its request or by taking no reply.
  void EndIfWaiting(SteadyTime now, const CallTimeouts& timeouts);
  // With `status`, where it waits for a request.
  void EndIfReading(const absl::Status& status);

  SteadyTime arrival() const { return report_->arrival(); }
  SteadyTime deadline() const { return deadline_; }  // SteadyTime::max(): none
  // The token's, or where there are no tokens metadata x-tenant as the client sent it.
  const std::string& tenant() const { return report_->tenant(); }
  // For a request that this call carries among others: reports it by itself, as one of that call.
  std::shared_ptr<CallReport> ReportOf(SteadyTime arrival) const { return report_->OfRequest(arrival); }

 private:
  Rpc(grpc::CallbackServerContext* context, const RpcWorkers& workers, std::unique_ptr<CallSlot> slot,
      SteadyTime deadline, std::shared_ptr<CallReport> report, std::unique_ptr<RpcHandler> handler);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;
  void RunInWriter() override;

  // The request that has been read, by the handler; decompressed first, if need be.
  void HandleRequest();
  absl::Status HandleDecompressed(const grpc::ByteBuffer& bytes);
  void HandleRequestInPool();
  // After the last callback of gRPC, and of the pool.
  void Complete();

  // Has the writer's thread pump. False once gRPC has been told the end.
  bool WakePump();
  // Sends what there is to send, unless a write is outstanding: its end will.
  void Pump();
  void PumpAsAsked();
  // The handler's next reply as bytes in reply_; false: there is none now.
  bool TakeReply(std::optional<absl::Status>* end);
  void Read();
  // Where the handler reads ahead: another one, unless one is awaited or none can come.
  void ReadAhead();
  // Ends the call with `status` as soon as no write is outstanding.
  void End(absl::Status status);
  absl::Status HasGone() const;  // what a call ends with that its client waits for no longer
  bool AtDeadline() const;

  grpc::CallbackServerContext* const context_;  // until OnDone
  grpc_call* const call_;                       // counted, so that it can be cancelled at any time
  const RpcWorkers workers_;
  const std::unique_ptr<CallSlot> slot_;
  const SteadyTime deadline_;
  const std::shared_ptr<CallReport> report_;
  std::unique_ptr<RpcHandler> handler_;
  const bool reads_ahead_;
  std::shared_ptr<Rpc> self_;  // until OnDone
  bool compressed_ = false;    // request_ is
  bool reads_ended_ = false;   // set by reads, asked for when all is over: no request came any more
  grpc::ByteBuffer request_;   // of the read that is outstanding
  grpc::ByteBuffer reply_;     // of the write that is outstanding

  Mutex mutex_;
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;            // a write is outstanding, or a thread is in Pump
  bool again_ ABSL_GUARDED_BY(mutex_) = false;           // the thread in Pump shall ask the handler once more
  bool queued_ ABSL_GUARDED_BY(mutex_) = false;          // in the writer's or the pool's queue
  bool large_replies_ ABSL_GUARDED_BY(mutex_) = false;   // of what is queued
  bool waits_for_pool_ ABSL_GUARDED_BY(mutex_) = false;  // a request does
  // Of its threads, in HandleRequest: a stream's reply may bring the next request before the last one's thread is out.
  int in_pool_ ABSL_GUARDED_BY(mutex_) = 0;
  bool reading_ ABSL_GUARDED_BY(mutex_) = false;  // as ReadAhead asks: a read is outstanding, or none can come any more
  bool done_ ABSL_GUARDED_BY(mutex_) = false;     // OnDone has come: context_ may be gone
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;  // as context_ said then
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;   // gRPC has been told the end: it may call OnDone at any moment
  std::optional<absl::Status> forced_end_ ABSL_GUARDED_BY(mutex_);
  grpc::StatusCode code_ ABSL_GUARDED_BY(mutex_) = grpc::StatusCode::UNKNOWN;  // that gRPC has been told
  SteadyTime stalled_since_ ABSL_GUARDED_BY(mutex_);  // a reply is ready and a write outstanding; SteadyTime(): not so
  SteadyTime::duration stall_ ABSL_GUARDED_BY(mutex_) = {};
  SteadyTime reading_since_ ABSL_GUARDED_BY(mutex_);  // as the next: a request is awaited; SteadyTime(): none
  SteadyTime writing_since_ ABSL_GUARDED_BY(mutex_);  // gRPC has a reply or the end, and has not sent it
};

// A method with one request and one reply, answered at once.
template <typename Request, typename Response>
class UnaryHandler final : public RpcHandler {
 public:
  using Function = std::function<absl::Status(const Rpc&, const Request&, Response*)>;
  explicit UnaryHandler(Function function) : function_(std::move(function)) {}

  absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) override {
    Request request;
    const absl::Status status = ParseMessage(bytes, &request);
    return status.ok() ? function_(*rpc, request, &response_) : status;
  }
  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override {
    *end = absl::OkStatus();
    return &response_;
  }
  void ReleaseReply() override { response_ = Response(); }

 private:
  const Function function_;
  Response response_;
};

}  // namespace dejavu

#endif  // SERVER_RPC_RPC_H_
