// A status carries text beside its message, and nothing else: a refusal is written to it here and read from it here.
#include "engine/refusal.h"

#include <string>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/check.h"

namespace dejavu {
namespace {

constexpr char kPayload[] = "dejavud/refusal";
constexpr int kNoReason = -1;

}  // namespace

const char* Name(Refusal refusal) {
  switch (refusal) {
    case Refusal::kInvalid:
      return "INVALID";
    case Refusal::kQueueFull:
      return "QUEUE_FULL";
    case Refusal::kQueueTokens:
      return "QUEUE_TOKENS";
    case Refusal::kTenantRequests:
      return "TENANT_REQUESTS";
    case Refusal::kTenantTokens:
      return "TENANT_TOKENS";
    case Refusal::kDeadlineInfeasible:
      return "DEADLINE_INFEASIBLE";
    case Refusal::kDraining:
      return "DRAINING";
    case Refusal::kFailed:
      return "FAILED";
    case Refusal::kQuotaExceeded:
      return "QUOTA_EXCEEDED";
  }
  return "?";
}

absl::Status WithRefusal(absl::Status status, const RefusalInfo& info) {
  const int reason = info.reason.has_value() ? static_cast<int>(*info.reason) : kNoReason;
  status.SetPayload(kPayload, absl::Cord(absl::StrCat(reason, " ", info.retry_after.count())));
  return status;
}

std::optional<RefusalInfo> RefusalOf(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(kPayload);
  if (!payload.has_value()) return std::nullopt;
  const std::pair<std::string, std::string> parts = absl::StrSplit(std::string(*payload), absl::MaxSplits(' ', 1));
  int reason = 0;
  int64_t ms = 0;
  CHECK(absl::SimpleAtoi(parts.first, &reason) && absl::SimpleAtoi(parts.second, &ms)) << std::string(*payload);
  RefusalInfo info;
  if (reason != kNoReason) info.reason = static_cast<Refusal>(reason);
  info.retry_after = std::chrono::milliseconds(ms);
  return info;
}

}  // namespace dejavu
