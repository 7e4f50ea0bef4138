// How many neurons of a synthetic model are selected and active, and what a step reads of it, without generating
// anything. Any thread.
//
// In layer l neuron j is selected with probability s_j at a token, tokens being independent given s_j; a share `hot` of
// the neurons has s = 0.9, the others follow a Kumaraswamy distribution (a Beta distribution whose quantiles are
// elementary). The parameters of each quarter of the depth were fitted to the densities that Polar Sparsity (NeurIPS
// 2025) ships for OPT: what its routers select at batches 1, 4, 8 and 16. Those are selections, so they are taken for
// what BALANCED selects, and the true activity p_j is lower: it follows from s_j, the recall and the quality of the
// predictor (neuron_table.h).
#ifndef ENGINE_LOAD_SYNTHETIC_DENSITIES_H_
#define ENGINE_LOAD_SYNTHETIC_DENSITIES_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "engine/load/synthetic/neuron_table.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "engine/sparsity.h"

namespace dejavu {

inline constexpr int kDensityQuarters = 4;  // parts of the depth with a distribution of their own

// How often BALANCED selects each neuron of a layer, the most frequent first.
std::vector<double> SelectionShares(const SyntheticModel& model, int32_t layer);

// What the generator aims at in one layer. `batch` independent tokens; shares of the layer's neurons.
struct SyntheticDensity {
  double selected = 0.0;   // by BALANCED for some token
  double active = 0.0;     // not zero for some token
  double precision = 0.0;  // of what one token selects, the share that is active
};
SyntheticDensity ExpectedDensity(const SyntheticModel& model, int32_t layer, int32_t batch);
// The same with the table of the model's recall, where several layers are asked for.
SyntheticDensity ExpectedDensity(const SyntheticModel& model, const NeuronTable& table, int32_t layer, int32_t batch);

// What a decode step of independent tokens reads of a layer; shares of its neurons.
struct LayerReads {
  double up = 1.0, down = 1.0;
};
// By tier, layer and entry of `batches`; within a thousandth of the neurons. Takes some 30 ms.
using ReadTable = std::array<std::vector<std::vector<LayerReads>>, kAllTiers.size()>;
ReadTable ExpectedReads(const SyntheticModel& model, absl::Span<const int> batches);

// The model whose published densities it follows: "OPT-6.7b".
std::string DensitySource(const SyntheticModel& model);

}  // namespace dejavu

#endif  // ENGINE_LOAD_SYNTHETIC_DENSITIES_H_
