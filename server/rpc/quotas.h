// Quotas: what tenants have used of what their lines in the token file allow (server/security/tenant_limits.h). What is
// used in a minute fades evenly within the next one, so that a tenant may take a minute's worth at once and goes on at
// the rate of its quota. Limits are asked for at each request: they may change at any time, and what was used stays.
// Any thread.
#ifndef SERVER_RPC_QUOTAS_H_
#define SERVER_RPC_QUOTAS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"
#include "server/security/tenant_limits.h"

namespace dejavu {

class Quotas {
 public:
  struct Usage {
    double requests = 0.0, tokens = 0.0;  // that count against the minute
    int64_t running = 0;
  };

  // Books a request that may take so many tokens, or refuses it: RESOURCE_EXHAUSTED with QuotaFailure, ErrorInfo and
  // RetryInfo. Without the latter it can never be let in.
  absl::Status Take(const std::string& tenant, const TenantLimits& limits, int64_t tokens, SteadyTime now);
  // One that was booked is over.
  void End(const std::string& tenant);
  // What it did not take after all.
  void GiveBack(const std::string& tenant, double requests, double tokens, SteadyTime now);

  Usage UsageOf(const std::string& tenant, const TenantLimits& limits, SteadyTime now);

 private:
  struct Account : Usage {
    TenantLimits limits;  // as they were at `at`
    SteadyTime at;
  };
  // Lets fade what was used since it was looked at last, by the limits that held meanwhile.
  static void Fade(const TenantLimits& limits, SteadyTime now, Account* account);

  Mutex mutex_;
  absl::flat_hash_map<std::string, Account> accounts_ ABSL_GUARDED_BY(mutex_);  // of tenants that have tokens
};

// What one request holds of its tenant's quotas. Each of the methods acts once. Any thread; it may outlive the server.
class QuotaLease {
 public:
  QuotaLease(std::shared_ptr<Quotas> quotas, std::string tenant, int64_t tokens)
      : quotas_(std::move(quotas)), tenant_(std::move(tenant)), tokens_(tokens) {}
  // What nobody has settled was not used.
  ~QuotaLease() {
    End();
    Settle(0, /*taken=*/false);
  }
  QuotaLease(const QuotaLease&) = delete;
  QuotaLease& operator=(const QuotaLease&) = delete;

  // The call is over for its client.
  void End();
  // The engine is done with it: so many tokens were used. `taken`: it counts as a request.
  void Settle(int64_t used_tokens, bool taken = true);

 private:
  const std::shared_ptr<Quotas> quotas_;
  const std::string tenant_;
  const int64_t tokens_;
  std::atomic<bool> ended_{false}, settled_{false};
};

}  // namespace dejavu

#endif  // SERVER_RPC_QUOTAS_H_
