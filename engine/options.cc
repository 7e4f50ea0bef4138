#include "engine/options.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/metrics.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

absl::Status Check(absl::string_view name, double value, Limits limits) {
  if (limits.least <= value && value <= limits.most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " is ", value, "; it must be in ", limits.least, " ... ", limits.most));
}

absl::Status CheckScheduler(const SchedulerOptions& o) {
  RETURN_IF_ERROR(Check("max_batch", o.max_batch, SchedulerOptions::kMaxBatch));
  Limits step = SchedulerOptions::kMaxStepTokens;
  step.least = o.max_batch;
  RETURN_IF_ERROR(Check("max_step_tokens", o.max_step_tokens, step));
  RETURN_IF_ERROR(Check("prefill_chunk_tokens", o.prefill_chunk_tokens, SchedulerOptions::kPrefillChunkTokens));
  RETURN_IF_ERROR(Check("inter_token_target_ms", o.inter_token_target_ms, kTimeLimits));
  RETURN_IF_ERROR(Check("prefill_share", o.prefill_share, SchedulerOptions::kPrefillShare));
  RETURN_IF_ERROR(Check("ageing_s", o.ageing_s, kTimeLimits));
  RETURN_IF_ERROR(Check("speculation_gain", o.speculation_gain, SchedulerOptions::kSpeculationGain));
  return ParseTenantWeights(o.tenant_weights).status();
}

absl::Status CheckAdmission(const AdmissionOptions& o) {
  RETURN_IF_ERROR(Check("max_waiting_requests", o.max_waiting_requests, AdmissionOptions::kMaxWaitingRequests));
  RETURN_IF_ERROR(
      Check("max_waiting_tokens", static_cast<double>(o.max_waiting_tokens), AdmissionOptions::kMaxWaitingTokens));
  RETURN_IF_ERROR(
      Check("tenant_max_waiting_requests", o.tenant_max_waiting_requests, AdmissionOptions::kTenantMaxWaitingRequests));
  RETURN_IF_ERROR(Check("tenant_max_waiting_tokens", static_cast<double>(o.tenant_max_waiting_tokens),
                        AdmissionOptions::kMaxWaitingTokens));
  return Check("deadline_slack", o.deadline_slack, AdmissionOptions::kDeadlineSlack);
}

}  // namespace

absl::StatusOr<TenantWeights> ParseTenantWeights(absl::string_view text) {
  TenantWeights weights;
  for (absl::string_view entry : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(entry, absl::MaxSplits('=', 1));
    double weight = 0.0;
    if (parts.first.empty() || !absl::SimpleAtod(parts.second, &weight) || !(weight > 0.0 && weight <= 1e6)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tenant_weights has '", entry, "'; an entry is tenant=weight with a weight above 0 and at most 1000000"));
    }
    for (const auto& [tenant, unused] : weights) {
      if (tenant == parts.first) {
        return absl::InvalidArgumentError(absl::StrCat("tenant_weights names '", tenant, "' twice"));
      }
    }
    weights.emplace_back(parts.first, weight);
  }
  return weights;
}

absl::Status CheckOptions(const EngineOptions& o) {
  RETURN_IF_ERROR(CheckScheduler(o.scheduler));
  RETURN_IF_ERROR(CheckAdmission(o.admission));
  RETURN_IF_ERROR(Check("kv.block_tokens", o.kv.block_tokens, KvOptions::kBlockTokens));
  RETURN_IF_ERROR(Check("kv.memory_mib", static_cast<double>(o.kv.memory_mib), KvOptions::kMemoryMib));
  RETURN_IF_ERROR(MetricEdgesFrom(o.metrics.edges).status());
  if (o.draft_weights != kAutoDrafts && o.draft_weights != kStoredDrafts && o.draft_weights != kInt8Drafts) {
    return absl::InvalidArgumentError(
        absl::StrCat("speculation.draft_weights is '", o.draft_weights, "'; it must be auto, stored or int8"));
  }
  if (!(o.memory_share > 0.0 && o.memory_share <= 1.0)) {  // less than people may configure is of use to tests
    return absl::InvalidArgumentError(absl::StrCat("memory_share is ", o.memory_share, "; it must be in (0, 1]"));
  }
  RETURN_IF_ERROR(Check("watchdog_s", o.watchdog_s, EngineOptions::kWatchdog));
  RETURN_IF_ERROR(Check("peer_timeout_s", o.peer_timeout_s, kTimeLimits));
  return Check("tensor_parallel", o.tensor_parallel, EngineOptions::kTensorParallel);
}

}  // namespace dejavu
