// TenantMetrics: calls and tokens by tenant, for tenants that tokens speak for. The first so many tenants that come
// have series of their own, and all others share one, so that the page stays bounded whatever the token file says. Any
// thread, under the caller's lock.
#ifndef SERVER_OBSERVE_TENANT_METRICS_H_
#define SERVER_OBSERVE_TENANT_METRICS_H_

#include <cstdint>
#include <map>
#include <string>

#include "server/observe/metrics_page.h"
#include "server/rpc/request_record.h"

namespace dejavu {

class TenantMetrics {
 public:
  // 0: nothing is counted.
  explicit TenantMetrics(int most_tenants) : most_tenants_(most_tenants) {}

  void Count(const RequestRecord& record);
  void AddTo(MetricsPage& page) const;

 private:
  struct Counts {
    std::map<grpc::StatusCode, int64_t> calls;
    int64_t prompt_tokens = 0, generated_tokens = 0, over_quota = 0;
  };

  const int most_tenants_;
  std::map<std::string, Counts> tenants_;
};

}  // namespace dejavu

#endif  // SERVER_OBSERVE_TENANT_METRICS_H_
