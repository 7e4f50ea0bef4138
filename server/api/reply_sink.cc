#include "server/api/reply_sink.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/clock.h"
#include "server/rpc/error_details.h"

namespace dejavu {

void ReplySink::SetCancelReason(absl::Status reason) {
  MutexLock lock(mutex_);
  if (cancel_reason_.ok()) cancel_reason_ = std::move(reason);
}

std::optional<EngineOutcome> ReplySink::outcome() {
  MutexLock lock(mutex_);
  return outcome_;
}

absl::Status ReplySink::EndStatus(const Finish& finish) {
  switch (finish.reason) {
    case FinishReason::kLength:
    case FinishReason::kTime:
    case FinishReason::kEos:
    case FinishReason::kStopToken:
    case FinishReason::kSink:
      return absl::OkStatus();
    case FinishReason::kCancelled:
      return cancel_reason_.ok() ? absl::CancelledError("the request was cancelled") : cancel_reason_;
    case FinishReason::kDeadline:
      return absl::DeadlineExceededError(
          absl::StrCat("the deadline passed after ", finish.generated_tokens, " generated tokens"));
    case FinishReason::kShutdown:
      return StoppedBeforeDone();
    case FinishReason::kError:
      if (finish.status.ok()) return absl::InternalError("the engine ended the request without a reason");
      if (absl::IsUnavailable(finish.status)) return UnavailableRetry(finish.status.message(), std::chrono::seconds(1));
      return finish.status;
  }
  return absl::InternalError("unknown finish reason");
}

absl::string_view ReasonName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kLength:
      return "length";
    case FinishReason::kTime:
      return "time";
    case FinishReason::kEos:
      return "eos";
    case FinishReason::kStopToken:
      return "stop_token";
    case FinishReason::kSink:
      return "stop_string";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kDeadline:
      return "deadline";
    case FinishReason::kShutdown:
      return "shutdown";
    case FinishReason::kError:
      return "error";
  }
  return "error";
}

void FillTimings(const Finish& finish, SteadyTime arrival, v1::Timings* timings) {
  timings->set_queue_ms(Milliseconds(arrival, finish.scheduled));
  timings->set_ttft_ms(Milliseconds(arrival, finish.first_token));
  timings->set_total_ms(Milliseconds(arrival, finish.finished));
  if (finish.generated_tokens > 1) {
    timings->set_mean_itl_ms(Milliseconds(finish.first_token, finish.finished) / (finish.generated_tokens - 1));
  }
}

}  // namespace dejavu
