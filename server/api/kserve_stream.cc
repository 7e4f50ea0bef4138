#include "server/api/kserve_stream.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "server/api/generate_call.h"
#include "server/api/kserve_dialect.h"
#include "server/api/load_report.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

// Requests of one stream that are under way. More are read when one of them has ended.
constexpr size_t kMostAtOnce = 64;

}  // namespace

struct KServeStream::Infer {
  Infer(ServingState* state, std::unique_ptr<KServeDialect> owned, std::shared_ptr<CallReport> its_report)
      : dialect(*owned), call(state, std::move(owned)), report(std::move(its_report)) {}

  void End(grpc::StatusCode code) { report->EndCall(code, {}, call.record_source()); }

  const KServeDialect& dialect;  // the call's
  GenerateCall call;
  const std::shared_ptr<CallReport> report;
  bool begun = false;                   // guarded by the stream's mutex: NextReply may ask the call
  std::optional<absl::Status> refused;  // likewise
};

KServeStream::KServeStream(ServingState* state) : state_(*state) {}
KServeStream::~KServeStream() = default;

bool KServeStream::TakesMore() {
  MutexLock lock(mutex_);
  return infers_.size() < kMostAtOnce;
}

absl::Status KServeStream::OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) {
  const SteadyTime now = std::chrono::steady_clock::now();
  const std::shared_ptr<CallReport> report = rpc->ReportOf(now);
  auto made =
      std::make_unique<Infer>(&state_, std::make_unique<KServeDialect>(state_.model(), /*in_stream=*/true), report);
  Infer* const infer = made.get();
  {
    MutexLock lock(mutex_);
    if (cancelled_) return absl::OkStatus();
    infers_.push_back(std::move(made));  // before it runs: a cancel must find it
  }
  absl::Status status = infer->call.OnRequest({rpc, now, report}, bytes);
  if (!status.ok()) infer->call.ReleaseReply();  // the client may be slow to hear of it
  MutexLock lock(mutex_);
  infer->begun = true;
  if (!status.ok()) infer->refused = std::move(status);
  return absl::OkStatus();
}

std::string KServeStream::load_report(const std::string& tenant) { return LoadReportBytes(state_, tenant); }

void KServeStream::OnHalfClose() {
  MutexLock lock(mutex_);
  half_closed_ = true;
}

const google::protobuf::MessageLite* KServeStream::NextReply(std::optional<absl::Status>* end) {
  ended_.reset();
  std::vector<Infer*> begun;
  {
    MutexLock lock(mutex_);
    if (infers_.empty()) {
      if (half_closed_) *end = absl::OkStatus();
      // Where as many ran as can, no read was under way for Stop to end.
      if (!half_closed_ && state_.phase() == Phase::kStopped) *end = ServerStopped();
    }
    for (const auto& infer : infers_) {
      if (infer->begun) begun.push_back(infer.get());
    }
  }
  for (size_t i = 0; i < begun.size(); ++i) {
    const google::protobuf::MessageLite* const reply = NextOf(begun[(turn_ + i) % begun.size()]);
    if (reply == nullptr) continue;
    turn_ += i + 1;
    return reply;
  }
  return nullptr;
}

// Requests are taken out of the list here alone, so that the others of NextReply stay.
const google::protobuf::MessageLite* KServeStream::NextOf(Infer* infer) {
  std::optional<absl::Status> end = infer->refused;
  const google::protobuf::MessageLite* reply = end.has_value() ? nullptr : infer->call.NextReply(&end);
  if (!end.has_value()) return reply;
  if (!end->ok()) {
    error_ = infer->dialect.ErrorReply(*end);
    reply = &error_;
  }
  infer->End(static_cast<grpc::StatusCode>(end->code()));
  MutexLock lock(mutex_);
  const auto found =
      std::find_if(infers_.begin(), infers_.end(), [&](const auto& other) { return other.get() == infer; });
  ended_ = std::move(*found);
  infers_.erase(found);
  return reply;
}

void KServeStream::OnCancel() {
  MutexLock lock(mutex_);
  cancelled_ = true;
  for (const auto& infer : infers_) infer->call.OnCancel();
}

void KServeStream::OnEnd(grpc::StatusCode code) {
  std::vector<std::unique_ptr<Infer>> left;
  {
    MutexLock lock(mutex_);
    left.swap(infers_);
  }
  for (const auto& infer : left) infer->End(code);
}

}  // namespace dejavu
