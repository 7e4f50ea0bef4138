#include "server/observe/tenant_metrics.h"

namespace dejavu {
namespace {

// No tenant's name: it has a space.
constexpr char kOtherTenants[] = "all others";

}  // namespace

void TenantMetrics::Count(const RequestRecord& record) {
  if (most_tenants_ == 0 || record.tenant.empty()) return;
  const bool known = tenants_.count(record.tenant) > 0;
  const size_t own = tenants_.size() - tenants_.count(kOtherTenants);
  Counts& counts = tenants_[known || own < static_cast<size_t>(most_tenants_) ? record.tenant : kOtherTenants];
  ++counts.calls[record.code];
  counts.prompt_tokens += record.prompt_tokens;
  counts.generated_tokens += record.generated_tokens;
  if (record.over_quota) ++counts.over_quota;
}

void TenantMetrics::AddTo(MetricsPage& page) const {
  for (const auto& [tenant, counts] : tenants_) {
    for (const auto& [code, calls] : counts.calls) {
      page.Counter("tenant_requests_total", "Calls that have ended, by tenant and gRPC code.",
                   static_cast<double>(calls), {{"tenant", tenant}, {"code", std::string(CodeName(code))}});
    }
  }
  for (const auto& [tenant, counts] : tenants_) {
    page.Counter("tenant_prompt_tokens_total", "Tokens of prompts, by tenant.",
                 static_cast<double>(counts.prompt_tokens), {{"tenant", tenant}});
  }
  for (const auto& [tenant, counts] : tenants_) {
    page.Counter("tenant_generated_tokens_total", "Tokens that were generated, by tenant.",
                 static_cast<double>(counts.generated_tokens), {{"tenant", tenant}});
  }
  for (const auto& [tenant, counts] : tenants_) {
    page.Counter("tenant_quota_refusals_total", "Requests beyond a quota of their tenant.",
                 static_cast<double>(counts.over_quota), {{"tenant", tenant}});
  }
}

}  // namespace dejavu
