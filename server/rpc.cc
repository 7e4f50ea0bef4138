// Who may issue the next write is decided by busy_: taken in Pump, given back in OnWriteDone or when there was nothing
// to send. A producer adds to the handler first and calls Wake then; Wake sets again_ when somebody is in Pump, so
// nothing is left lying.
#include "server/rpc.h"

#include <utility>

#include "server/error_details.h"

namespace dejavu {
namespace {

class RefusedRpc final : public grpc::ServerGenericBidiReactor {
 public:
  explicit RefusedRpc(const absl::Status& status) { Finish(ToGrpcStatus(status)); }
  void OnDone() override { delete this; }
};

// gRPC keeps deadlines as system time; the engine's clock is the steady one.
SteadyTime SteadyDeadline(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return SteadyTime::max();
  return std::chrono::steady_clock::now() + (deadline - std::chrono::system_clock::now());
}

void Serialize(const google::protobuf::MessageLite& message, grpc::ByteBuffer* bytes) {
  grpc::Slice slice(message.ByteSizeLong());
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  *bytes = grpc::ByteBuffer(&slice, 1);
}

}  // namespace

grpc::ServerGenericBidiReactor* Rpc::Refuse(const absl::Status& status) { return new RefusedRpc(status); }

grpc::ServerGenericBidiReactor* Rpc::Start(grpc::CallbackServerContext* context, Writer* writer,
                                           std::unique_ptr<RpcHandler> handler) {
  const auto tenant = context->client_metadata().find("x-tenant");
  const std::shared_ptr<Rpc> rpc(new Rpc(
      writer, SteadyDeadline(*context),
      tenant == context->client_metadata().end() ? "" : std::string(tenant->second.data(), tenant->second.size()),
      std::move(handler)));
  // gRPC runs a handler even when the deadline has passed before it started.
  if (rpc->deadline_ <= rpc->arrival_) {
    return Refuse(absl::DeadlineExceededError("the deadline passed before the request arrived"));
  }
  rpc->self_ = rpc;
  rpc->StartRead(&rpc->request_);
  return rpc.get();
}

Rpc::Rpc(Writer* writer, SteadyTime deadline, std::string tenant, std::unique_ptr<RpcHandler> handler)
    : writer_(writer),
      arrival_(std::chrono::steady_clock::now()),
      deadline_(deadline),
      tenant_(std::move(tenant)),
      handler_(std::move(handler)) {}

void Rpc::Wake() {
  MutexLock lock(mutex_);
  if (finished_ || queued_) return;
  if (busy_) {
    again_ = true;
    return;
  }
  queued_ = true;
  // Under the lock: OnDone takes it too, so neither this object nor the writer can go away in the middle.
  writer_->Post(shared_from_this());
}

void Rpc::RunInWriter() {
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
      end = forced_end_;
    }
    const google::protobuf::MessageLite* const message = end.has_value() ? nullptr : handler_->NextReply(&end);
    if (message != nullptr) Serialize(*message, &reply_);
    if (end.has_value()) {
      {
        MutexLock lock(mutex_);
        finished_ = true;
      }
      // Nothing of this object may be touched after either call.
      if (message != nullptr) {
        StartWriteAndFinish(&reply_, grpc::WriteOptions(), ToGrpcStatus(*end));
      } else {
        Finish(ToGrpcStatus(*end));
      }
      return;
    }
    if (message != nullptr) {
      StartWrite(&reply_);
      return;
    }
  }
}

void Rpc::End(absl::Status status) {
  {
    MutexLock lock(mutex_);
    if (!forced_end_.has_value()) forced_end_ = std::move(status);
  }
  Pump();
}

void Rpc::OnReadDone(bool ok) {
  if (!ok) {
    End(handler_->streams_requests() ? absl::OkStatus()
                                     : absl::InvalidArgumentError("the call holds no request message"));
    return;
  }
  const absl::Status status = handler_->OnRequest(shared_from_this(), request_);
  request_.Clear();
  if (status.ok()) {
    Pump();
  } else {
    End(status);
  }
}

void Rpc::OnWriteDone(bool ok) {
  if (ok && handler_->streams_requests()) StartRead(&request_);
  {
    MutexLock lock(mutex_);
    busy_ = false;
  }
  if (ok) {
    Pump();
  } else {
    End(absl::CancelledError("the client has gone"));
  }
}

void Rpc::OnCancel() {
  handler_->OnCancel();
  const bool late = std::chrono::steady_clock::now() >= deadline_;
  End(late ? absl::DeadlineExceededError("the deadline passed") : absl::CancelledError("the client has gone"));
}

void Rpc::OnDone() {
  handler_.reset();
  { MutexLock lock(mutex_); }  // a Wake that had begun is through
  self_.reset();
}

}  // namespace dejavu
