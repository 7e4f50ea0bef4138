// Why a request is refused, as a status carries it from where it is refused to the end of the call. Any thread.
#ifndef ENGINE_REFUSAL_H_
#define ENGINE_REFUSAL_H_

#include <chrono>
#include <optional>

#include "absl/status/status.h"

namespace dejavu {

enum class Refusal {
  kInvalid,    // INVALID_ARGUMENT, FAILED_PRECONDITION: it can never run here
  kQueueFull,  // RESOURCE_EXHAUSTED, as the next three
  kQueueTokens,
  kTenantRequests,
  kTenantTokens,
  kDeadlineInfeasible,  // DEADLINE_EXCEEDED
  kDraining,            // UNAVAILABLE, as the next
  kFailed,
  kQuotaExceeded,  // RESOURCE_EXHAUSTED: its tenant's; by the server
};
inline constexpr int kRefusals = 9;
const char* Name(Refusal refusal);  // "QUEUE_FULL"

// What the status of a refused request says beside its message.
struct RefusalInfo {
  std::optional<Refusal> reason = {};        // the engine's; nothing where it was not the engine that refused
  std::chrono::milliseconds retry_after{0};  // 0: trying again is of no use
};
absl::Status WithRefusal(absl::Status status, const RefusalInfo& info);
std::optional<RefusalInfo> RefusalOf(const absl::Status& status);  // nothing where nothing was refused

}  // namespace dejavu

#endif  // ENGINE_REFUSAL_H_
