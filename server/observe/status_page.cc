#include "server/observe/status_page.h"

#include <string>
#include <utility>
#include <vector>

#include "engine/metrics.h"
#include "nlohmann/json.hpp"
#include "server/api/server_info.h"
#include "server/api/sparsity_messages.h"
#include "server/rpc/lifecycle.h"

namespace dejavu {

extern const char kStatusPageHtml[];  // made by the build

namespace {

using Json = nlohmann::ordered_json;

// All tiers and urgencies together.
Json Merged(const HistogramFamily& family) {
  std::vector<int64_t> counts(family.edges().size() + 1);
  double sum = 0.0;
  for (size_t i = 0; i < family.series(); ++i) {
    const Histogram::Snapshot snapshot = family[i].snapshot();
    for (size_t bucket = 0; bucket < counts.size(); ++bucket) counts[bucket] += snapshot.counts[bucket];
    sum += snapshot.sum;
  }
  return {{"edges", family.edges()}, {"counts", counts}, {"sum", sum}};
}

Json LatencyJson(const EngineMetrics& metrics) {
  return {{"time_to_first_token", Merged(metrics.time_to_first_token)},
          {"inter_token", Merged(metrics.inter_token)},
          {"queue", Merged(metrics.queue)},
          {"duration", Merged(metrics.duration)}};
}

Json LoadJson(const EngineStats& stats) {
  return {{"running", stats.running},
          {"waiting", stats.waiting},
          {"oldest_wait_seconds", stats.oldest_wait_s},
          {"kv_blocks_total", stats.kv_blocks_total},
          {"kv_blocks_free", stats.kv_blocks_free},
          {"kv_blocks_cached", stats.kv_blocks_cached},
          {"steps", stats.steps},
          {"prompt_tokens", stats.prompt_tokens},
          {"generated_tokens", stats.generated_tokens},
          {"preemptions", stats.preemptions}};
}

Json StepJson(const EngineMetrics& metrics) {
  const auto sum = [&](StepComponent part) { return metrics.step_component[part].snapshot().sum; };
  return {{"parts",
           {{"plan", sum(kPlanPart)},
            {"shadow", sum(kShadowPart)},
            {"forward", sum(kForwardPart)},
            {"handout", sum(kHandOutPart)}}}};
}

Json RequestsJson(const Account& account) {
  Json refused = Json::object();
  for (int i = 0; i < kRefusals; ++i) refused[Name(static_cast<Refusal>(i))] = account.refused[i];
  return {{"received", account.received}, {"finished", account.finished}, {"cancelled", account.cancelled},
          {"failed", account.failed},     {"live", account.live},         {"refused", std::move(refused)}};
}

Json SparsityJson(const Engine& engine, const SparsityStats& stats) {
  const EngineMetrics& metrics = engine.metrics();
  int64_t fallbacks = 0, recoveries = 0, bytes = 0;
  for (const LayerSparsityStats& layer : stats.layers) {
    fallbacks += layer.fallbacks;
    recoveries += layer.recoveries;
  }
  for (int kind = 0; kind < kWeightKinds; ++kind) bytes += metrics.weight_bytes_read[kind].value();
  return {{"predictor", engine.predictor().path},
          {"shadow_tokens", stats.shadow_tokens},
          {"shadow_agreements", stats.shadow_agreements},
          {"fallbacks", fallbacks},
          {"recoveries", recoveries},
          {"weight_bytes_read", bytes},
          {"weight_bytes_saved", metrics.weight_bytes_saved.value()},
          {"bandwidth", metrics.bandwidth.value()},
          {"measured_bandwidth", metrics.measured_bandwidth.value()}};
}

Json LayersJson(const SparsityStats& stats, const ModelShape& shape) {
  Json layers = Json::array();
  for (size_t l = 0; l < stats.layers.size(); ++l) {
    const LayerShares shares = SharesOf(stats.layers[l], shape);
    layers.push_back({{"layer", l},
                      {"decode_rows", stats.layers[l].rows},
                      {"mlp_density", shares.mlp_density},
                      {"head_density", shares.head_density},
                      {"union_density", shares.union_density},
                      {"recall", shares.recall},
                      {"missed_mass", shares.missed_mass},
                      {"exact_tiers", Json::array()}});
  }
  for (const SparsityStats::Fallback& fallback : stats.exact_now) {
    layers[fallback.layer]["exact_tiers"].push_back(std::string(Name(fallback.tier)));
  }
  return layers;
}

// What there is to say once the model is loaded.
void AddEngine(const Engine& engine, const v1::GetServerInfoResponse& info, Json* json) {
  const EngineStats stats = engine.stats();
  const SparsityStats sparsity = engine.sparsity_stats();
  (*json)["backend"] = info.backend();
  (*json)["synthetic"] = info.synthetic();
  (*json)["limits"] = {{"max_batch", info.limits().max_batch()},
                       {"max_waiting_requests", info.limits().max_waiting_requests()}};
  (*json)["load"] = LoadJson(stats);
  (*json)["latency"] = LatencyJson(engine.metrics());
  (*json)["step"] = StepJson(engine.metrics());
  (*json)["layers"] = LayersJson(sparsity, engine.model());
  (*json)["sparsity"] = SparsityJson(engine, sparsity);
  (*json)["requests"] = RequestsJson(stats.account);
}

}  // namespace

std::string StatusPage() { return kStatusPageHtml; }

std::string StatusJson(const ServingState& state) {
  const v1::GetServerInfoResponse info = ServerInfo(state);
  Json json = {{"version", info.version()},
               {"state", Name(info.state())},
               {"model", info.model()},
               {"uptime_seconds", info.uptime_seconds()},
               {"default_tier", std::string(Name(state.default_tier()))}};
  if (const ServedModel* const model = state.model_if_loaded()) AddEngine(*model->engine, info, &json);
  // A model may be called anything.
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace dejavu
