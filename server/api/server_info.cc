#include "server/api/server_info.h"

#include <algorithm>
#include <chrono>

#include "server/api/sparsity_messages.h"
#include "server/api/speculation_messages.h"
#include "server/api/validate.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

void FillLimits(const ServerOptions& options, const EngineOptions& engine, v1::Limits* limits) {
  limits->set_max_batch(static_cast<uint32_t>(engine.scheduler.max_batch));
  limits->set_max_waiting_requests(static_cast<uint32_t>(engine.admission.max_waiting_requests));
  limits->set_default_max_new_tokens(static_cast<uint32_t>(options.default_max_new_tokens));
  limits->set_max_top_logprobs(static_cast<uint32_t>(options.max_top_logprobs));
  limits->set_max_stop_strings(static_cast<uint32_t>(options.max_stop_strings));
  limits->set_max_stop_string_bytes(static_cast<uint32_t>(options.max_stop_string_bytes));
  limits->set_max_stop_token_ids(static_cast<uint32_t>(options.max_stop_token_ids));
  limits->set_max_logit_bias(static_cast<uint32_t>(options.max_logit_bias));
  limits->set_max_message_bytes(static_cast<uint64_t>(options.max_message_bytes));
  limits->set_max_samples(static_cast<uint32_t>(options.max_samples));
  limits->set_max_score_prompts(kMaxScorePrompts);
  limits->set_max_waiting_tokens(static_cast<uint64_t>(engine.admission.max_waiting_tokens));
  limits->set_tenant_max_waiting_requests(static_cast<uint32_t>(engine.admission.tenant_max_waiting_requests));
  limits->set_tenant_max_waiting_tokens(static_cast<uint64_t>(engine.admission.tenant_max_waiting_tokens));
}

void FillLoad(const EngineStats& stats, v1::Load* load) {
  load->set_running_requests(static_cast<uint32_t>(stats.running));
  load->set_waiting_requests(static_cast<uint32_t>(stats.waiting));
  load->set_kv_blocks_total(static_cast<uint32_t>(stats.kv_blocks_total));
  load->set_kv_blocks_free(static_cast<uint32_t>(stats.kv_blocks_free));
  load->set_steps(static_cast<uint64_t>(stats.steps));
  load->set_prompt_tokens(static_cast<uint64_t>(stats.prompt_tokens));
  load->set_generated_tokens(static_cast<uint64_t>(stats.generated_tokens));
  load->set_kv_blocks_cached(static_cast<uint32_t>(stats.kv_blocks_cached));
  load->set_cached_prompt_tokens(static_cast<uint64_t>(stats.cached_prompt_tokens));
  load->set_preemptions(static_cast<uint64_t>(stats.preemptions));
}

void FillAdmission(const Account& account, v1::Admission* admission) {
  admission->set_received(static_cast<uint64_t>(account.received));
  admission->set_finished(static_cast<uint64_t>(account.finished));
  admission->set_cancelled(static_cast<uint64_t>(account.cancelled));
  admission->set_failed(static_cast<uint64_t>(account.failed));
  admission->set_live(static_cast<uint64_t>(account.live));
  for (int i = 0; i < kRefusals; ++i) {
    (*admission->mutable_refused())[Name(static_cast<Refusal>(i))] = static_cast<uint64_t>(account.refused[i]);
  }
}

void FillCosts(const EngineStats& stats, v1::CostModel* costs) {
  costs->set_steps(static_cast<uint64_t>(stats.cost_steps));
  costs->set_dense_ms(stats.costs.dense_ms);
  costs->set_exact_ms(stats.costs.exact_ms);
  costs->set_predicted_ms(stats.costs.predicted_ms);
  costs->set_row_ms(stats.costs.row_ms);
  costs->set_prefill_token_ms(stats.costs.prefill_token_ms);
  costs->set_context_token_ms(stats.costs.context_token_ms);
  costs->set_check_row_ms(stats.costs.check_row_ms);
}

void FillTenant(const ServingState& state, const std::string& tenant, bool busy, v1::TenantInfo* info) {
  const TenantLimits limits = state.LimitsOf(tenant);
  const Quotas::Usage usage = state.quotas()->UsageOf(tenant, limits, std::chrono::steady_clock::now());
  info->set_tenant(tenant);
  if (limits.requests_per_minute) info->set_requests_per_minute(static_cast<uint64_t>(*limits.requests_per_minute));
  if (limits.tokens_per_minute) info->set_tokens_per_minute(static_cast<uint64_t>(*limits.tokens_per_minute));
  if (limits.concurrent_requests) info->set_concurrent_requests(static_cast<uint64_t>(*limits.concurrent_requests));
  info->set_highest_tier(ToMessage(std::max(limits.best(), state.options().highest_tier)));
  info->set_lowest_tier(ToMessage(std::min(limits.worst(), state.options().lowest_tier)));
  info->set_requests_used(usage.requests);
  info->set_tokens_used(usage.tokens);
  info->set_live_requests(static_cast<uint64_t>(usage.running));
  info->set_busy(busy);
}

// What other tenants do, and where files are, is not every tenant's affair.
void HideOthers(v1::GetServerInfoResponse* info) {
  info->clear_load();
  info->clear_admission();
  info->mutable_cost_model()->clear_steps();
  v1::SparsityInfo* const sparsity = info->mutable_sparsity();
  sparsity->clear_shadow_tokens();
  sparsity->clear_shadow_top1_agreement();
  sparsity->clear_shadow_kl_nats();
  v1::SpeculationInfo* const speculation = info->mutable_speculation();
  speculation->clear_sources();
  speculation->clear_rounds();
  speculation->clear_tokens();
  speculation->clear_seconds();
  speculation->clear_plain_seconds();
  const size_t folder = sparsity->predictor().rfind('/');
  if (folder != std::string::npos) sparsity->mutable_predictor()->erase(0, folder + 1);
}

}  // namespace

absl::Status CheckMayKnowLoad(const ServingState& state, const std::string& tenant) {
  if (!state.knows_tenants() || tenant == state.options().auth_admin_tenant) return absl::OkStatus();
  return WithErrorInfo(absl::PermissionDeniedError("what the server does for others is told to operators"),
                       "NOT_AN_OPERATOR");
}

v1::GetServerInfoResponse ServerInfo(const ServingState& state) {
  v1::GetServerInfoResponse info;
  info.set_version(DEJAVU_VERSION);
  info.set_state(StateOf(state.phase()));
  info.set_model(state.model_name());
  info.set_uptime_seconds(SecondsSince(state.started()));
  FillLimits(state.options(), state.engine_options(), info.mutable_limits());
  const ServedModel* const model = state.model_if_loaded();
  FillInfo(state.options(), model == nullptr ? nullptr : model->engine, info.mutable_sparsity());
  info.mutable_sparsity()->set_default_tier(ToMessage(state.default_tier()));
  FillInfo(state.options(), model == nullptr ? nullptr : model->engine, info.mutable_speculation());
  if (model == nullptr) return info;  // still loading: no backend and no load to speak of
  info.set_backend(model->engine->backend_description());
  info.set_synthetic(model->engine->synthetic());
  const EngineStats stats = model->engine->stats();
  FillLoad(stats, info.mutable_load());
  FillAdmission(stats.account, info.mutable_admission());
  FillCosts(stats, info.mutable_cost_model());
  return info;
}

absl::Status GetServerInfo(const ServingState& state, const std::string& tenant,
                           const v1::GetServerInfoRequest& /*request*/, v1::GetServerInfoResponse* response) {
  *response = ServerInfo(state);
  if (!state.knows_tenants()) return absl::OkStatus();
  FillTenant(state, tenant, response->load().waiting_requests() > 0, response->mutable_tenant());
  if (!CheckMayKnowLoad(state, tenant).ok()) HideOthers(response);
  return absl::OkStatus();
}

}  // namespace dejavu
