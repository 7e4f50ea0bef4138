// MemoryFit: whether a model and its keys and values fit the memory of devices that need not be there, and what would.
// Everything is that of rank 0: no rank has more. Any thread.
#ifndef ENGINE_PLANNING_MEMORY_FIT_H_
#define ENGINE_PLANNING_MEMORY_FIT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/shard.h"
#include "engine/options.h"
#include "engine/plan_options.h"
#include "engine/planning/planned_model.h"
#include "engine/planning/rank_shapes.h"
#include "kernels/tensor.h"

namespace dejavu {

struct MemoryFit {
  Shard shard;
  DType weights = DType::kFloat16, kv = DType::kFloat16;
  RankWeights weight_bytes;
  RankPredictor predictor_bytes;
  int64_t draft_bytes = 0;  // DraftWeights; 0: none
  int64_t budget = 0, activations = 0;
  int64_t block_bytes = 0, per_sequence = 0;  // of keys and values
  int64_t blocks = 0;                         // that the daemon would take
  int64_t for_kv = 0;                         // what the rest leaves for them; may be negative

  bool fits() const { return for_kv >= blocks * block_bytes && blocks >= per_sequence; }
};

int64_t MemoryBytes(const PlanOptions& devices);

// INVALID_ARGUMENT for types that there are not and for more ranks than neurons or tokens.
absl::StatusOr<MemoryFit> MeasureFit(const PlannedModel& model, const EngineOptions& options,
                                     const PlanOptions& devices);

// Of one that does not fit.
std::string WhyNot(const MemoryFit& fit, const ModelShape& shape);

// What would fit in place of a plan that does not.
struct PlanAlternative {
  std::string flags;  // "--plan-devices 8"
  std::string text;   // "8 devices instead of 4"
};

std::vector<PlanAlternative> FindAlternatives(const PlannedModel& model, const EngineOptions& options,
                                              const PlanOptions& devices, const MemoryFit& fit);

}  // namespace dejavu

#endif  // ENGINE_PLANNING_MEMORY_FIT_H_
