// How many bytes of weights a decoded token reads, part by part, from the shapes and types of the tensors as they are
// stored; of a rank, its own. Plain data; any thread.
#ifndef ENGINE_MODEL_WEIGHT_BYTES_H_
#define ENGINE_MODEL_WEIGHT_BYTES_H_

#include <cstdint>

#include "engine/model/opt_config.h"
#include "engine/model/opt_weights.h"
#include "engine/model/predictor_data.h"
#include "engine/sparsity.h"

namespace dejavu {

// One layer.
struct LayerBytes {
  LayerBytes(const LayerWeights& weights, const ModelShape& shape);

  int64_t up_row = 0;     // of a neuron, with its bias
  int64_t down_row = 0;   // of a neuron
  int64_t down_bias = 0;  // read in every tier
  int64_t head = 0;       // of a head: Q rows with their biases, rows of the out-projection
  int64_t rest = 0;       // both norms, K and V of every head, bias of the out-projection
  int64_t mlp = 0;        // a dense MLP: both matrices and both biases
};

// Once per step: final norm, projections and the head over the vocabulary.
int64_t BytesAfterLayers(const OptWeights& weights);
// Once per row: a token's embedding and its position's.
int64_t EmbeddingBytes(const OptWeights& weights);

// What choosing among `outputs` neurons (heads) reads in `tier`, as stored: both stages, scales and thresholds. 0
// without an operating point. The heads' stage A rides along whole, whatever the point's rank.
int64_t NeuronPredictorBytes(const SelectorData& neurons, Tier tier, int64_t hidden, int64_t outputs);
int64_t HeadPredictorBytes(const SelectorData& heads, Tier tier, int64_t hidden, int64_t outputs);

}  // namespace dejavu

#endif  // ENGINE_MODEL_WEIGHT_BYTES_H_
