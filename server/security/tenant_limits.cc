#include "server/security/tenant_limits.h"

#include <algorithm>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr absl::string_view kNames =
    "requests_per_minute, tokens_per_minute, concurrent_requests, highest_tier and lowest_tier";

std::optional<int64_t> ReadQuota(absl::string_view text) {
  int64_t value = 0;
  const bool digits = !text.empty() && text.find_first_not_of("0123456789") == text.npos;
  if (!digits || !absl::SimpleAtoi(text, &value) || value < 1 || value > kMaxTenantQuota) return std::nullopt;
  return value;
}

// Into `place`, unless another value stands there.
template <typename Value>
absl::Status Set(absl::string_view name, std::optional<Value> value, absl::string_view form,
                 std::optional<Value>* place) {
  if (!value.has_value()) return absl::InvalidArgumentError(absl::StrCat(name, " must be ", form));
  if (place->has_value() && *place != value) {
    return absl::InvalidArgumentError(absl::StrCat(name, " has had another value for the same tenant"));
  }
  *place = value;
  return absl::OkStatus();
}

}  // namespace

absl::Status TenantLimits::Add(absl::string_view settings) {
  const auto quota = [&](absl::string_view name, absl::string_view text, std::optional<int64_t>* place) {
    return Set(name, ReadQuota(text), absl::StrCat("a number, 1 to ", kMaxTenantQuota), place);
  };
  const auto tier = [&](absl::string_view name, absl::string_view text, std::optional<Tier>* place) {
    return Set(name, ParseTier(text), "dense, exact, high, balanced or fast", place);
  };
  for (const absl::string_view setting : absl::StrSplit(settings, absl::ByAnyChar(" \t"), absl::SkipEmpty())) {
    const size_t equals = std::min(setting.find('='), setting.size());
    const absl::string_view name = setting.substr(0, equals);
    const absl::string_view value = setting.substr(std::min(equals + 1, setting.size()));
    absl::Status status = absl::InvalidArgumentError(absl::StrCat("a setting is NAME=VALUE; names are ", kNames));
    if (name == "requests_per_minute") status = quota("requests_per_minute", value, &requests_per_minute);
    if (name == "tokens_per_minute") status = quota("tokens_per_minute", value, &tokens_per_minute);
    if (name == "concurrent_requests") status = quota("concurrent_requests", value, &concurrent_requests);
    if (name == "highest_tier") status = tier("highest_tier", value, &highest_tier);
    if (name == "lowest_tier") status = tier("lowest_tier", value, &lowest_tier);
    RETURN_IF_ERROR(status);
  }
  if (best() <= worst()) return absl::OkStatus();
  return absl::InvalidArgumentError("highest_tier must be of at least the quality of lowest_tier");
}

}  // namespace dejavu
