// PlannedModel: what a capacity plan knows of a model, whose weights need not be there: its shape, its tiers, and what
// a step of each reads. Plain data; any thread.
#ifndef ENGINE_PLANNING_PLANNED_MODEL_H_
#define ENGINE_PLANNING_PLANNED_MODEL_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/load/synthetic/densities.h"
#include "engine/model/opt_config.h"
#include "engine/model/predictor_data.h"
#include "engine/options.h"
#include "engine/sparsity.h"
#include "kernels/tensor.h"

namespace dejavu {

struct PlannedModel {
  std::string name;
  std::string densities;   // where they come from, for people
  bool synthetic = false;  // they are another model's
  OptConfig config;
  DType stored = DType::kFloat16;          // type of its matrices, where they are not converted
  std::optional<DType> converted;          // of a converted model theirs; `stored` is what int8 has left
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

}  // namespace dejavu

#endif  // ENGINE_PLANNING_PLANNED_MODEL_H_
