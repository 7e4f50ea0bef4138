// CapacityPlan: what a model takes of devices that need not be there, and how fast its tokens can come: arithmetic over
// shapes, for `dejavud --plan`. Everything is that of rank 0: no rank has more. Plain data; any thread.
#ifndef ENGINE_PLANNING_CAPACITY_PLAN_H_
#define ENGINE_PLANNING_CAPACITY_PLAN_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/opt_config.h"
#include "engine/model/shard.h"
#include "engine/options.h"
#include "engine/plan_options.h"
#include "engine/planning/memory_fit.h"
#include "engine/planning/planned_model.h"
#include "engine/planning/rank_shapes.h"
#include "engine/sparsity.h"
#include "kernels/tensor.h"

namespace dejavu {

struct TierPlan {
  Tier tier = Tier::kDense;
  // By batch.
  std::vector<double> step_bytes;         // of weights, predictor included, that a step reads
  std::vector<std::optional<double>> ms;  // between two tokens; nothing where the keys and values do not fit
};

struct CapacityPlan {
  // As asked.
  std::string model, densities, device;
  bool synthetic = false;
  OptConfig config;
  DType weights = DType::kFloat16, kv = DType::kFloat16;
  Shard shard;  // of rank 0, without neurons' ids
  int64_t memory_bytes = 0;
  double memory_share = 0.0;
  double bandwidth_gbs = 0.0, bandwidth_share = 0.0, all_reduce_us = 0.0;
  int all_reduces = 0;  // of a step
  int context_tokens = 0;

  // Of a rank.
  int64_t budget_bytes = 0;
  RankWeights weight_bytes;
  RankPredictor predictor_bytes;
  int64_t draft_bytes = 0;  // DraftWeights; 0: none
  int64_t activation_bytes = 0;
  int64_t kv_bytes = 0, kv_token_bytes = 0;
  int64_t left_bytes = 0;      // may be negative
  int64_t kv_tokens = 0;       // as the daemon would take them
  int64_t kv_tokens_room = 0;  // without the limits of scheduler.max_batch and kv.memory_mib
  int64_t largest_batch = 0;   // scheduler.max_batch

  std::vector<int> batches;
  std::vector<TierPlan> tiers;

  bool fits = false;
  std::string reason;  // why not
  std::vector<PlanAlternative> alternatives;
};

// `model` from DescribeModel. INVALID_ARGUMENT for types that there are not and for more ranks than neurons or tokens.
absl::StatusOr<CapacityPlan> PlanCapacity(const PlannedModel& model, const EngineOptions& options,
                                          const PlanOptions& devices);

}  // namespace dejavu

#endif  // ENGINE_PLANNING_CAPACITY_PLAN_H_
