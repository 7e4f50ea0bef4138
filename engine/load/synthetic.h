// Synthetic models: the shapes of OPT with generated weights, for measuring speed where no real weights are at hand.
// They say nothing about text. What is modelled: how many neurons of each layer are active, how their union grows with
// the batch, and a predictor that reaches a stated recall. Whoever shows a figure of one shows that it is synthetic.
// One thread per call; generating uses threads of its own.
#ifndef ENGINE_LOAD_SYNTHETIC_H_
#define ENGINE_LOAD_SYNTHETIC_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model/opt_config.h"
#include "engine/model/opt_weights.h"
#include "engine/model/predictor_file.h"
#include "engine/model/shard.h"
#include "engine/sparsity.h"
#include "kernels/backend.h"

namespace dejavu {

// "synthetic:opt-6.7b?seed=1&recall=0.95&density=1"; everything from '?' on may be absent.
struct SyntheticModel {
  std::string name;  // "opt-6.7b"
  OptConfig config;
  int profile = 0;  // row of the table of densities
  uint64_t seed = 1;
  // Of the neurons that are not zero, the share that BALANCED selects; HIGH misses 0.4 times as many, FAST twice as
  // many.
  double recall = 0.95;
  double density = 1.0;  // how many neurons are selected, in multiples of the published profile

  // One line for people: shape, seed, profile, recall and precision.
  std::string Description() const;
  // Names the weights; in place of a hash.
  std::string Fingerprint() const;
};

bool IsSynthetic(const std::string& model);

// INVALID_ARGUMENT with what there is for unknown names, options and values.
absl::StatusOr<SyntheticModel> ParseSynthetic(const std::string& model);

// What the generator aims at in one layer. `batch` independent tokens; shares of the layer's neurons.
struct SyntheticDensity {
  double selected = 0.0;   // by BALANCED for some token
  double active = 0.0;     // not zero for some token
  double precision = 0.0;  // of what one token selects, the share that is active
};
SyntheticDensity ExpectedDensity(const SyntheticModel& model, int32_t layer, int32_t batch);

// What a decode step of independent tokens reads of a layer, without generating anything; shares of its neurons.
struct LayerReads {
  double up = 1.0, down = 1.0;
};
// By tier, layer and entry of `batches`; within a thousandth of the neurons. Takes some 30 ms.
using ReadTable = std::array<std::vector<std::vector<LayerReads>>, kAllTiers.size()>;
ReadTable ExpectedReads(const SyntheticModel& model, absl::Span<const int> batches);

// The model whose published densities it follows: "OPT-6.7b".
std::string DensitySource(const SyntheticModel& model);

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

#endif  // ENGINE_LOAD_SYNTHETIC_H_
