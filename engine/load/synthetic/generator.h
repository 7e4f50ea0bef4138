// GenerateModel: the weights and the predictor of a synthetic model. One thread per call; generating uses threads of
// its own.
#ifndef ENGINE_LOAD_SYNTHETIC_GENERATOR_H_
#define ENGINE_LOAD_SYNTHETIC_GENERATOR_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "engine/model/opt_weights.h"
#include "engine/model/predictor_data.h"
#include "engine/model/shard.h"
#include "kernels/backend.h"

namespace dejavu {

// The predictor that GenerateModel makes, without matrices and thresholds.
PredictorData PredictorOutline(const SyntheticModel& model);

// A rank's in memory, but for what alignment takes.
struct SyntheticBytes {
  int64_t weights = 0, predictor = 0;
};
SyntheticBytes BytesOf(const OptConfig& config, const Shard& shard, DType dtype);

// The model's own predictor as far as it is known before the weights are: with frequencies, by which a shard is made,
// and nothing to select with.
PredictorData StartPredictor(const SyntheticModel& model);

// What `shard` owns of the weights straight into the backend's memory, matrices as `dtype`, and the rest of `predictor`
// (nullptr: not wanted), of which columns of neurons that the shard does not own remain zero. The same seed gives the
// same weights in every type but for rounding, on any number of threads and ranks. RESOURCE_EXHAUSTED before anything
// is generated where it does not fit.
absl::StatusOr<OptWeights> GenerateModel(const SyntheticModel& model, const Shard& shard, DType dtype, Backend& backend,
                                         const LoadProgress& progress, PredictorData* predictor);

}  // namespace dejavu

#endif  // ENGINE_LOAD_SYNTHETIC_GENERATOR_H_
