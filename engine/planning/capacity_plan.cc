// A model is a set of tensors with shapes and no memory: what a rank holds of it is what DeviceLayout would take, what
// a step reads of it is what engine/model/weight_bytes.h counts. A step then takes
//   (weights and predictor read + keys and values of the context) / (bandwidth * share) + all-reduces * time of one
// and nothing for arithmetic, launches, sampling and prompts.
#include "engine/planning/capacity_plan.h"

#include <algorithm>
#include <optional>

#include "engine/model/weight_bytes.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

double StepBytes(const PlannedModel& model, const OptWeights& weights, const Shard& shard, Tier tier, size_t b) {
  const OptConfig& config = model.config;
  double bytes = static_cast<double>(BytesAfterLayers(weights) + model.batches[b] * EmbeddingBytes(weights));
  const LayerBytes layer(weights.layers.front(), config);  // all have the same shapes
  for (int32_t l = 0; l < config.layers; ++l) {
    const LayerReads& reads = model.reads[static_cast<size_t>(tier)][l][b];
    bytes += static_cast<double>(layer.rest + layer.down_bias + shard.heads.count * layer.head);
    bytes += shard.neuron_count *
             (reads.up * static_cast<double>(layer.up_row) + reads.down * static_cast<double>(layer.down_row));
    if (!model.predictor.has_value()) continue;
    const LayerPredictorData& predictor = model.predictor->layers[l];
    bytes += static_cast<double>(NeuronPredictorBytes(predictor.neurons, tier, config.hidden, shard.neuron_count) +
                                 HeadPredictorBytes(predictor.heads, tier, config.hidden, shard.heads.count));
  }
  return bytes;
}

// How long steps take, of each tier and batch.
void AddTiers(const PlannedModel& model, const MemoryFit& fit, int32_t block_tokens, CapacityPlan* plan) {
  const RankShapes shapes(model.config, fit.shard, fit.weights, model.stored);
  const int64_t context_blocks = (plan->context_tokens + block_tokens - 1) / block_tokens;
  for (const Tier tier : model.tiers) {
    TierPlan& of = plan->tiers.emplace_back();
    of.tier = tier;
    for (size_t b = 0; b < plan->batches.size(); ++b) {
      of.step_bytes.push_back(StepBytes(model, shapes.weights(), fit.shard, tier, b));
      const double context_bytes =
          static_cast<double>(plan->batches[b] * plan->kv_token_bytes) * static_cast<double>(plan->context_tokens);
      const double ms = (of.step_bytes.back() + context_bytes) / (plan->bandwidth_gbs * plan->bandwidth_share * 1e6) +
                        plan->all_reduces * plan->all_reduce_us * 1e-3;
      const bool room = fit.fits() && plan->batches[b] * context_blocks <= fit.blocks;
      of.ms.push_back(room ? std::optional(ms) : std::nullopt);
    }
  }
}

}  // namespace

absl::StatusOr<CapacityPlan> PlanCapacity(const PlannedModel& model, const EngineOptions& options,
                                          const PlanOptions& devices) {
  const OptConfig& config = model.config;
  ASSIGN_OR_RETURN(const MemoryFit fit, MeasureFit(model, options, devices));
  CapacityPlan plan;
  plan.model = model.name;
  plan.densities = model.densities;
  plan.synthetic = model.synthetic;
  plan.device = devices.device;
  plan.config = config;
  plan.weights = fit.weights;
  plan.kv = fit.kv;
  plan.shard = fit.shard;
  plan.memory_bytes = MemoryBytes(devices);
  plan.memory_share = options.memory_share;
  plan.bandwidth_gbs = devices.bandwidth_gbs;
  plan.bandwidth_share = devices.bandwidth_share;
  plan.all_reduce_us = devices.all_reduce_us;
  plan.all_reduces = devices.devices > 1 ? 1 + 2 * config.layers : 0;  // the embedding; attention and MLP of each layer
  plan.context_tokens = std::min(devices.context_tokens, config.context);

  plan.budget_bytes = fit.budget;
  plan.weight_bytes = fit.weight_bytes;
  plan.predictor_bytes = fit.predictor_bytes;
  plan.draft_bytes = fit.draft_bytes;
  plan.activation_bytes = fit.activations;
  plan.kv_bytes = fit.blocks * fit.block_bytes;
  plan.kv_token_bytes = fit.block_bytes / options.kv.block_tokens;
  plan.left_bytes = fit.for_kv - plan.kv_bytes;
  plan.kv_tokens = fit.blocks * options.kv.block_tokens;
  // Drafts give theirs back where keys and values would want it.
  const int64_t room = fit.for_kv + (options.draft_weights == kAutoDrafts ? fit.draft_bytes : 0);
  plan.kv_tokens_room = std::max<int64_t>(room, 0) / fit.block_bytes * options.kv.block_tokens;
  plan.largest_batch = options.scheduler.max_batch;

  plan.batches = model.batches;
  AddTiers(model, fit, options.kv.block_tokens, &plan);
  plan.fits = fit.fits();
  if (!plan.fits) {
    plan.reason = WhyNot(fit, config);
    plan.alternatives = FindAlternatives(model, options, devices, fit);
  }
  return plan;
}

}  // namespace dejavu
