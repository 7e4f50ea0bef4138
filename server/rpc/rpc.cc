// busy_ decides which thread may issue the next write: Pump takes it, OnWriteDone gives it back, or Pump itself where
// there was nothing to send. A producer adds to the handler first and calls Wake then; Wake sets again_ when another
// thread is in Pump, so that nothing is left lying.
#include "server/rpc/rpc.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/refusal.h"
#include "grpc/grpc.h"
#include "grpc/support/time.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/compression.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

constexpr std::chrono::milliseconds kMoment(50);
// What compressed text becomes, for the order of work and for what may wait.
constexpr int64_t kUsualInflation = 8;

// A request up to that size is handled by the thread that has read it: about a millisecond of tokenising.
constexpr int64_t kSmallRequestBytes = 8 << 10;
// Where a reply stands in the pool's queue among requests of that size.
constexpr int64_t kReplyRank = 16 << 10;

class RefusedRpc final : public grpc::ServerGenericBidiReactor {
 public:
  explicit RefusedRpc(const absl::Status& status) { Finish(ToGrpcStatus(status)); }
  void OnDone() override { delete this; }
};

// Nothing: the client sent no such metadata. What is sent twice is a list, as in HTTP: it must not depend on who looks
// which of them counts.
std::optional<std::string> Metadata(const grpc::CallbackServerContext& context, const char* key) {
  const auto [begin, end] = context.client_metadata().equal_range(key);
  if (begin == end) return std::nullopt;
  return absl::StrJoin(begin, end, ",", [](std::string* out, const auto& entry) {
    out->append(entry.second.data(), entry.second.size());
  });
}

// gRPC keeps deadlines as a time of day; the engine's clock is the steady one. A deadline may be millions of years
// away, which C++'s clocks cannot hold.
SteadyTime SteadyDeadline(const grpc::CallbackServerContext& context) {
  const gpr_timespec deadline = context.raw_deadline();
  if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) == 0) return SteadyTime::max();
  const gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
  return std::chrono::steady_clock::now() + Lasting(static_cast<double>(left.tv_sec) + 1e-9 * left.tv_nsec);
}

// What retryPolicy of gRPC's service configs waits for instead of its own pause. Before the call is finished.
void AdviseRetry(const absl::Status& status, grpc::CallbackServerContext* context) {
  if (!absl::IsUnavailable(status)) return;
  const std::optional<RefusalInfo> refusal = RefusalOf(status);
  if (!refusal.has_value() || refusal->retry_after.count() == 0) return;
  context->AddTrailingMetadata("grpc-retry-pushback-ms", std::to_string(refusal->retry_after.count()));
}

void Serialize(const google::protobuf::MessageLite& message, grpc::ByteBuffer* bytes) {
  grpc::Slice slice(message.ByteSizeLong());
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  *bytes = grpc::ByteBuffer(&slice, 1);
}

}  // namespace

RequestRecord Rpc::Describe(const grpc::CallbackServerContext& context, double trace_ratio) {
  RequestRecord record;
  record.arrival = std::chrono::steady_clock::now();
  record.tenant = Metadata(context, "x-tenant").value_or("");
  record.peer = context.peer();
  record.trace = ContextFor(Metadata(context, "traceparent"), trace_ratio);
  return record;
}

grpc::ServerGenericBidiReactor* Rpc::Refuse(grpc::CallbackServerContext* context, const absl::Status& status,
                                            RequestRecord record, const CallEnds& ends) {
  record.code = static_cast<grpc::StatusCode>(status.code());
  record.ended = std::chrono::steady_clock::now();
  ends.Report(record);
  AdviseRetry(status, context);
  return new RefusedRpc(status);
}

grpc::ServerGenericBidiReactor* Rpc::Start(grpc::CallbackServerContext* context, const RpcWorkers& workers,
                                           std::unique_ptr<CallSlot> slot, std::shared_ptr<CallEnds> ends,
                                           RequestRecord record, std::unique_ptr<RpcHandler> handler) {
  const SteadyTime deadline = SteadyDeadline(*context);
  // gRPC runs a handler even when the deadline has passed before it started.
  if (deadline <= record.arrival) {
    slot->NoteEnd(/*by_deadline=*/true);
    return Refuse(context, absl::DeadlineExceededError("the deadline passed before the request arrived"),
                  std::move(record), *ends);
  }
  auto report = std::make_shared<CallReport>(std::move(ends), std::move(record));
  const std::shared_ptr<Rpc> rpc(
      new Rpc(context, workers, std::move(slot), deadline, std::move(report), std::move(handler)));
  rpc->self_ = rpc;
  workers.calls->Add(rpc);
  rpc->Read();
  return rpc.get();
}

Rpc::Rpc(grpc::CallbackServerContext* context, const RpcWorkers& workers, std::unique_ptr<CallSlot> slot,
         SteadyTime deadline, std::shared_ptr<CallReport> report, std::unique_ptr<RpcHandler> handler)
    : context_(context),
      call_(context->c_call()),
      workers_(workers),
      slot_(std::move(slot)),
      deadline_(deadline),
      report_(std::move(report)),
      handler_(std::move(handler)),
      reads_ahead_(handler_->reads_ahead()) {
  grpc_call_ref(call_);
}

Rpc::~Rpc() { grpc_call_unref(call_); }

void Rpc::Read() {
  {
    MutexLock lock(mutex_);
    reading_ = true;
    reading_since_ = std::chrono::steady_clock::now();
  }
  StartRead(&request_);
}

// A stream that carries several requests may wait for the next one as long as it likes.
void Rpc::ReadAhead() {
  if (!reads_ahead_ || !handler_->TakesMore()) return;
  MutexLock lock(mutex_);
  if (reading_ || finished_ || forced_end_.has_value()) return;
  reading_ = true;
  StartRead(&request_);  // under the lock: from the pool, the call could else be over before
}

void Rpc::Wake() {
  if (!WakePump()) report_->Wake();
}

bool Rpc::WakePump() {
  MutexLock lock(mutex_);
  if (finished_) return false;
  if (queued_) return true;
  if (busy_) {
    again_ = true;
    if (stalled_since_ == SteadyTime()) stalled_since_ = std::chrono::steady_clock::now();
    return true;
  }
  queued_ = true;
  large_replies_ = handler_->large_replies();  // it may be gone when the writer comes to it
  // Under the lock: the call cannot finish without it, so neither this object nor the writer goes away in the middle.
  workers_.writer->Post(shared_from_this());
  return true;
}

void Rpc::RunInWriter() {
  bool large = false;
  {
    MutexLock lock(mutex_);
    large = large_replies_;
  }
  if (large) {
    workers_.pool->PostReply(kReplyRank, [self = shared_from_this()] { self->PumpAsAsked(); });
  } else {
    PumpAsAsked();
  }
}

void Rpc::PumpAsAsked() {
  {
    MutexLock lock(mutex_);
    queued_ = false;
  }
  Pump();
}

void Rpc::Pump() {
  {
    MutexLock lock(mutex_);
    if (finished_) return;
    again_ = true;
    if (busy_) return;
    busy_ = true;
  }
  while (true) {
    std::optional<absl::Status> end;
    {
      MutexLock lock(mutex_);
      if (!again_) {
        busy_ = false;
        return;
      }
      again_ = false;
      if (stalled_since_ != SteadyTime()) stall_ += std::chrono::steady_clock::now() - stalled_since_;
      stalled_since_ = SteadyTime();
      end = forced_end_;
    }
    const bool reply = !end.has_value() && TakeReply(&end);
    if (!reply && !end.has_value()) continue;
    {
      MutexLock lock(mutex_);
      writing_since_ = std::chrono::steady_clock::now();
      finished_ = end.has_value();
      if (finished_) code_ = static_cast<grpc::StatusCode>(end->code());
    }
    if (!end.has_value()) return StartWrite(&reply_);
    AdviseRetry(*end, context_);
    const std::string load = handler_->load_report(report_->tenant());
    if (!load.empty()) context_->AddTrailingMetadata("endpoint-load-metrics-bin", load);
    // Nothing of this object may be touched after either call.
    if (reply) return StartWriteAndFinish(&reply_, grpc::WriteOptions(), ToGrpcStatus(*end));
    return Finish(ToGrpcStatus(*end));
  }
}

bool Rpc::TakeReply(std::optional<absl::Status>* end) {
  const google::protobuf::MessageLite* const message = handler_->NextReply(end);
  if (message == nullptr) return false;
  const absl::Status room = slot_->Hold(static_cast<int64_t>(message->ByteSizeLong()));
  if (room.ok()) Serialize(*message, &reply_);
  if (!room.ok()) *end = room;
  if (end->has_value()) handler_->ReleaseReply();
  return room.ok();
}

void Rpc::EndIfWaiting(SteadyTime now, const CallTimeouts& timeouts) {
  constexpr char kStalled[] = "the client takes nothing";
  bool no_request = false, stalled = false;
  {
    MutexLock lock(mutex_);
    no_request = reading_since_ != SteadyTime() && now - reading_since_ > timeouts.request;
    stalled = !done_ && writing_since_ != SteadyTime() && now - writing_since_ > timeouts.stall;
    if (stalled) {
      forced_end_ = absl::ResourceExhaustedError(kStalled);  // what the client hears, for the report
      code_ = grpc::StatusCode::RESOURCE_EXHAUSTED;          // also where its end stood behind the reply
    }
  }
  if (stalled) {
    // Only so does gRPC give up a write.
    grpc_call_cancel_with_status(call_, GRPC_STATUS_RESOURCE_EXHAUSTED, kStalled, nullptr);
  } else if (no_request) {
    End(absl::DeadlineExceededError(
        absl::StrCat("no request message came within transport.request_timeout_s, ",
                     std::chrono::duration_cast<std::chrono::milliseconds>(timeouts.request).count(), " ms")));
  }
}

void Rpc::EndIfReading(const absl::Status& status) {
  {
    MutexLock lock(mutex_);
    if (reading_since_ == SteadyTime() && !(reads_ahead_ && reading_)) return;
  }
  End(status);
}

void Rpc::End(absl::Status status) {
  {
    MutexLock lock(mutex_);
    if (!forced_end_.has_value()) forced_end_ = std::move(status);
  }
  Pump();
}

absl::Status Rpc::HasGone() const {
  if (AtDeadline()) return absl::DeadlineExceededError("the deadline passed");
  if (slot_->closed_here()) return absl::UnavailableError("the connection was closed by the server");
  return absl::CancelledError("the client has gone");
}

// A client whose clock runs out first gives up a moment before we see the deadline pass.
bool Rpc::AtDeadline() const { return deadline_ - std::chrono::steady_clock::now() < kMoment; }

void Rpc::OnReadDone(bool ok) {
  {
    MutexLock lock(mutex_);
    reading_since_ = SteadyTime();
  }
  if (!ok) {
    reads_ended_ = true;
    if (reads_ahead_) {
      handler_->OnHalfClose();
      return Pump();
    }
    End(handler_->streams_requests() ? absl::OkStatus()
                                     : absl::InvalidArgumentError("the call holds no request message"));
    return;
  }
  auto bytes = static_cast<int64_t>(request_.Length());
  if (const absl::Status taken = slot_->TakeMessage(request_.Length()); !taken.ok()) {
    request_.Clear();
    return End(taken);
  }
  compressed_ = IsCompressed(request_);
  if (!compressed_ && bytes <= kSmallRequestBytes) return HandleRequest();
  // After what is small and after replies, whatever it says that it is.
  if (compressed_) {
    bytes = std::max({bytes, std::min(bytes * kUsualInflation, slot_->max_message_bytes()), kReplyRank + 1});
  }
  {
    MutexLock lock(mutex_);
    waits_for_pool_ = true;
  }
  const absl::Status posted =
      workers_.pool->PostRequest(bytes, [self = shared_from_this()] { self->HandleRequestInPool(); });
  if (posted.ok()) return;
  {
    MutexLock lock(mutex_);
    waits_for_pool_ = false;
  }
  End(posted);
}

void Rpc::HandleRequestInPool() {
  {
    MutexLock lock(mutex_);
    if (!std::exchange(waits_for_pool_, false) || finished_ || forced_end_.has_value()) return;
    ++in_pool_;
  }
  HandleRequest();
  bool last = false;
  {
    MutexLock lock(mutex_);
    last = --in_pool_ == 0 && done_;
  }
  if (last) Complete();
}

void Rpc::HandleRequest() {
  // Once the handler has a reply, the next read may begin.
  grpc::ByteBuffer bytes;
  bytes.Swap(&request_);
  const absl::Status status = compressed_ ? HandleDecompressed(bytes) : handler_->OnRequest(shared_from_this(), bytes);
  bytes.Clear();
  if (status.ok()) {
    if (reads_ahead_) {
      MutexLock lock(mutex_);
      reading_ = false;
    }
    ReadAhead();
    Pump();
  } else {
    End(status);
  }
}

absl::Status Rpc::HandleDecompressed(const grpc::ByteBuffer& bytes) {
  ASSIGN_OR_RETURN(const grpc::ByteBuffer whole, Decompress(bytes, slot_->max_message_bytes()));
  return handler_->OnRequest(shared_from_this(), whole);
}

void Rpc::OnWriteDone(bool ok) {
  reply_.Clear();
  slot_->LetGo();
  if (ok && handler_->streams_requests()) Read();
  if (ok) ReadAhead();
  {
    MutexLock lock(mutex_);
    busy_ = false;
    writing_since_ = SteadyTime();
  }
  if (ok) {
    Pump();
  } else {
    End(absl::CancelledError("the client has gone"));
  }
}

void Rpc::OnCancel() {
  handler_->OnCancel();
  slot_->NoteEnd(AtDeadline());
  End(HasGone());
}

void Rpc::OnDone() {
  {
    MutexLock lock(mutex_);
    done_ = true;
    cancelled_ = context_->IsCancelled();
    waits_for_pool_ = false;   // what waits there will find nothing to do
    if (in_pool_ > 0) return;  // the pool's last thread completes the call
  }
  Complete();
}

void Rpc::Complete() {
  workers_.calls->Remove(this);
  std::shared_ptr<RecordSource> source = handler_->record_source();
  grpc::StatusCode code = grpc::StatusCode::UNKNOWN;
  SteadyTime::duration stall = {};
  bool cancelled = false;
  {
    MutexLock lock(mutex_);
    cancelled = cancelled_;
    code = code_;
    stall = stall_;
  }
  // A client that has half-closed hears why the call ended; else it has gone, which gRPC may tell a moment later.
  if (reads_ended_ && cancelled) code = static_cast<grpc::StatusCode>(HasGone().code());
  handler_->OnEnd(code);
  handler_.reset();
  report_->EndCall(code, stall, std::move(source));
  self_.reset();
}

}  // namespace dejavu
