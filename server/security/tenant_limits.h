// TenantLimits: what a tenant may ask for, as the lines of the token file say it (server/security/tokens.h). Plain
// data.
#ifndef SERVER_SECURITY_TENANT_LIMITS_H_
#define SERVER_SECURITY_TENANT_LIMITS_H_

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "engine/sparsity.h"

namespace dejavu {

inline constexpr int64_t kMaxTenantQuota = 1'000'000'000'000;

// Nothing: no limit of the tenant's own.
struct TenantLimits {
  std::optional<int64_t> requests_per_minute = {};
  std::optional<int64_t> tokens_per_minute = {};  // of prompts and output
  std::optional<int64_t> concurrent_requests = {};
  std::optional<Tier> highest_tier = {};  // best quality
  std::optional<Tier> lowest_tier = {};
  bool operator==(const TenantLimits&) const = default;

  Tier best() const { return highest_tier.value_or(kAllTiers.front()); }
  Tier worst() const { return lowest_tier.value_or(kAllTiers.back()); }
  bool Allows(Tier tier) const { return tier >= best() && tier <= worst(); }  // less quality is the larger number
  Tier Nearest(Tier tier) const { return tier < best() ? best() : tier > worst() ? worst() : tier; }

  // Takes the settings of one line, "requests_per_minute=60 highest_tier=exact". INVALID_ARGUMENT, which never repeats
  // what stands there, for what is none, for one that is there already with another value, and for tiers the wrong way
  // round.
  absl::Status Add(absl::string_view settings);
};

}  // namespace dejavu

#endif  // SERVER_SECURITY_TENANT_LIMITS_H_
