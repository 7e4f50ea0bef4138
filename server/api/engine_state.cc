#include "server/api/engine_state.h"

#include <string>
#include <utility>

#include "server/api/server_info.h"
#include "server/api/sparsity_messages.h"

namespace dejavu {
namespace {

constexpr size_t kMaxLiveIds = 1000;

void FillLayer(const LayerSparsityStats& from, const ModelShape& shape, v1::LayerState* to) {
  const LayerShares shares = SharesOf(from, shape);
  to->set_decode_rows(static_cast<uint64_t>(from.rows));
  to->set_mlp_density(shares.mlp_density);
  to->set_head_density(shares.head_density);
  to->set_union_density(shares.union_density);
  to->set_shadow_rows(static_cast<uint64_t>(from.shadow_rows));
  to->set_recall(shares.recall);
  to->set_precision(shares.precision);
  to->set_missed_mass(shares.missed_mass);
  to->set_fallbacks(static_cast<uint64_t>(from.fallbacks));
  to->set_recoveries(static_cast<uint64_t>(from.recoveries));
}

}  // namespace

absl::Status GetEngineState(ServingState& state, const v1::GetEngineStateRequest& /*request*/,
                            v1::GetEngineStateResponse* response) {
  *response->mutable_server() = ServerInfo(state);
  for (LiveRequests::Live& live : state.live_requests().List(kMaxLiveIds)) {
    response->add_live_request_ids(std::move(live.id));
    response->add_live_request_tenants(std::move(live.tenant));
  }
  const ServedModel* const model = state.model_if_loaded();
  if (model == nullptr) return absl::OkStatus();
  const SparsityStats stats = model->engine->sparsity_stats();
  for (size_t l = 0; l < stats.layers.size(); ++l) {
    v1::LayerState* layer = response->add_layers();
    layer->set_layer(static_cast<uint32_t>(l));
    FillLayer(stats.layers[l], model->engine->model(), layer);
  }
  for (const SparsityStats::Fallback& fallback : stats.exact_now) {
    response->mutable_layers(fallback.layer)->add_exact_tiers(ToMessage(fallback.tier));
  }
  return absl::OkStatus();
}

}  // namespace dejavu
