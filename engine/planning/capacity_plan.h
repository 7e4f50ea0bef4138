// CapacityPlan: what a model takes of devices that need not be there, and how fast its tokens can come: arithmetic over
// shapes, for `dejavud --plan`. Everything is that of rank 0: no rank has more. Plain data; any thread.
#ifndef ENGINE_PLANNING_CAPACITY_PLAN_H_
#define ENGINE_PLANNING_CAPACITY_PLAN_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/load/synthetic.h"
#include "engine/model/opt_config.h"
#include "engine/model/predictor_file.h"
#include "engine/model/shard.h"
#include "engine/options.h"
#include "engine/plan_options.h"
#include "engine/sparsity.h"
#include "kernels/tensor.h"

namespace dejavu {

// A model without its weights.
struct PlannedModel {
  std::string name;
  std::string densities;   // where they come from, for people
  bool synthetic = false;  // they are another model's
  OptConfig config;
  DType stored = DType::kFloat16;          // type of its matrices, where they are not converted
  std::optional<PredictorData> predictor;  // without matrices and thresholds
  std::vector<Tier> tiers;                 // those whose reads are known, by falling quality
  std::vector<int> batches;
  ReadTable reads;  // for `batches`
};

// By `options.model`: a directory, of which only headers are read and, of a predictor, the neurons' frequencies; or a
// name such as opt-175b. A directory without weights stores float16. Batches are the powers of two up to max_batch,
// tiers those from `highest` to `lowest`. NOT_FOUND and INVALID_ARGUMENT with the reason.
absl::StatusOr<PlannedModel> DescribeModel(const EngineOptions& options, Tier highest = Tier::kDense,
                                           Tier lowest = Tier::kFast);

// Of a rank, with the padding of long rows.
struct RankWeights {
  int64_t split = 0;       // divided among the ranks: attention, MLP, vocabulary
  int64_t replicated = 0;  // on every rank: position embedding, norms, project_in and project_out
  int64_t first_rank = 0;  // on rank 0 alone: biases that are added once
  int64_t total() const { return split + replicated + first_rank; }
};

struct RankPredictor {
  int64_t split = 0;       // stage B, thresholds and worth of own neurons and heads
  int64_t replicated = 0;  // stage A
  int64_t total() const { return split + replicated; }
};

struct TierPlan {
  Tier tier = Tier::kDense;
  // By batch.
  std::vector<double> step_bytes;         // of weights, predictor included, that a step reads
  std::vector<std::optional<double>> ms;  // between two tokens; nothing where the keys and values do not fit
};

// What would fit in place of a plan that does not.
struct PlanAlternative {
  std::string flags;  // "--plan-devices 8"
  std::string text;   // "8 devices instead of 4"
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
