// A quota per minute is a bucket that holds a minute's worth. It is kept as what was used, not as what is left: a limit
// that changes then needs no conversion.
#include "server/rpc/quotas.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

constexpr double kMinute_s = 60.0;
constexpr double kRounding = 1e-6;  // of requests and tokens: whoever waits as advised gets in
constexpr std::chrono::milliseconds kConcurrencyRetry(1000);  // nobody knows when a request ends

absl::Status Exceeded(absl::string_view quota, absl::string_view message, int64_t value, int64_t limit,
                      std::chrono::milliseconds delay) {
  return WithErrorInfo(QuotaExceeded(quota, message, delay), "QUOTA_EXCEEDED",
                       {{"quota", std::string(quota)}, {"value", absl::StrCat(value)}, {"limit", absl::StrCat(limit)}});
}

// Whether `more` fits beside what was used within a minute.
absl::Status CheckRate(absl::string_view quota, double used, int64_t more, std::optional<int64_t> limit) {
  if (!limit.has_value()) return absl::OkStatus();
  if (more > *limit) {
    return Exceeded(quota, absl::StrCat(quota, ": the request may take ", more, "; the tenant's quota is ", *limit),
                    more, *limit, std::chrono::milliseconds(0));
  }
  const double over = used + static_cast<double>(more) - static_cast<double>(*limit);
  if (over < kRounding) return absl::OkStatus();
  const double wait_ms = std::ceil(over / static_cast<double>(*limit) * kMinute_s * 1e3);
  const auto value = static_cast<int64_t>(std::ceil(used));
  return Exceeded(quota,
                  absl::StrCat(quota, ": ", value, " are used and the request may take ", more,
                               " more; the tenant's quota is ", *limit),
                  value + more, *limit, std::chrono::milliseconds(std::max<int64_t>(1, static_cast<int64_t>(wait_ms))));
}

absl::Status CheckConcurrency(int64_t running, std::optional<int64_t> limit) {
  constexpr absl::string_view kQuota = "concurrent_requests";
  if (!limit.has_value() || running < *limit) return absl::OkStatus();
  return Exceeded(kQuota, absl::StrCat(kQuota, ": ", running, " run already; the tenant's quota is ", *limit),
                  running + 1, *limit, kConcurrencyRetry);
}

// What had no limit counts for nothing.
void FadeOne(std::optional<int64_t> limit, double seconds, double* used) {
  *used = limit.has_value() ? std::max(0.0, *used - static_cast<double>(*limit) / kMinute_s * seconds) : 0.0;
}

}  // namespace

void Quotas::Fade(const TenantLimits& limits, SteadyTime now, Account* account) {
  const double seconds = std::max(0.0, Seconds(account->at, now));
  FadeOne(account->limits.requests_per_minute, seconds, &account->requests);
  FadeOne(account->limits.tokens_per_minute, seconds, &account->tokens);
  account->limits = limits;
  account->at = std::max(account->at, now);
}

absl::Status Quotas::Take(const std::string& tenant, const TenantLimits& limits, int64_t tokens, SteadyTime now) {
  MutexLock lock(mutex_);
  Account& account = accounts_[tenant];
  Fade(limits, now, &account);
  RETURN_IF_ERROR(CheckConcurrency(account.running, limits.concurrent_requests));
  RETURN_IF_ERROR(CheckRate("requests_per_minute", account.requests, 1, limits.requests_per_minute));
  RETURN_IF_ERROR(CheckRate("tokens_per_minute", account.tokens, tokens, limits.tokens_per_minute));
  ++account.running;
  account.requests += 1.0;
  account.tokens += static_cast<double>(tokens);
  return absl::OkStatus();
}

void Quotas::End(const std::string& tenant) {
  MutexLock lock(mutex_);
  --accounts_[tenant].running;
}

void Quotas::GiveBack(const std::string& tenant, double requests, double tokens, SteadyTime now) {
  MutexLock lock(mutex_);
  Account& account = accounts_[tenant];
  Fade(TenantLimits(account.limits), now, &account);
  account.requests = std::max(0.0, account.requests - requests);
  account.tokens = std::max(0.0, account.tokens - tokens);
}

Quotas::Usage Quotas::UsageOf(const std::string& tenant, const TenantLimits& limits, SteadyTime now) {
  MutexLock lock(mutex_);
  Account& account = accounts_[tenant];
  Fade(limits, now, &account);
  return account;
}

void QuotaLease::End() {
  if (!ended_.exchange(true)) quotas_->End(tenant_);
}

void QuotaLease::Settle(int64_t used_tokens, bool taken) {
  if (settled_.exchange(true)) return;
  const auto left = static_cast<double>(std::max<int64_t>(0, tokens_ - used_tokens));
  quotas_->GiveBack(tenant_, taken ? 0.0 : 1.0, left, std::chrono::steady_clock::now());
}

}  // namespace dejavu
