// Loading runs in two passes over one plan. The first pass names every tensor that the model needs, checks it against
// the checkpoint and gives what this rank owns of each a place in one buffer; the second reads that stripe by stripe
// into those places, converting and transposing where that is wanted. Besides the buffer, memory holds a few stripes. A
// transposed matrix in int8 is read twice: a row's factor needs the whole row, which lies across all stripes.
//
// Of own rows the files give up nothing else. Own columns of a stored row are read from the first to the last of them:
// an out-projection's are a run, but a down-projection's lie all over the row, and a page of the file holds some of
// every rank's. There each rank reads the whole matrix and keeps its share.
#include "engine/model/opt_weights.h"

#include "engine/model/weight_plan.h"
#include "engine/model/weight_reader.h"
#include "kernels/base/status_macros.h"
#include "kernels/layout.h"

namespace dejavu {

void OptWeights::TieHead() {
  head.weight = token_embedding.weight;
  head.scale = token_embedding.scale;
}

absl::StatusOr<OptWeights> OptWeights::Allocate(const OptConfig& config, const Shard& shard, DType dtype,
                                                Backend& backend) {
  CHECK(config.embed == config.hidden && config.final_norm && config.biases && config.tied) << "not a plain OPT";
  using Layout = LinearWeights::Layout;
  OptWeights w;
  DeviceLayout layout;
  const auto vector = [&](Tensor* view, int64_t count) { layout.Reserve(view, DType::kFloat32, 1, count); };
  const auto matrix = [&](Tensor* weight, Tensor* scale, int64_t rows, int64_t cols) {
    layout.Reserve(weight, dtype, rows, cols);
    if (dtype == DType::kInt8) vector(scale, rows);
  };
  const auto norm = [&](NormWeights* n) {
    vector(&n->weight, config.hidden);
    vector(&n->bias, config.hidden);
  };
  const auto linear = [&](LinearWeights* to, Layout in, int64_t rows) {
    to->layout = in;
    matrix(&to->weight, &to->scale, rows, config.hidden);
    vector(&to->bias, in == Layout::kOutputRows ? rows : shard.first() ? config.hidden : 0);
  };
  const int64_t features = int64_t{shard.heads.count} * config.head_dim;
  matrix(&w.token_embedding.weight, &w.token_embedding.scale, shard.vocab.count, config.embed);
  layout.Reserve(&w.position_embedding, dtype == DType::kInt8 ? DType::kBFloat16 : dtype,
                 config.context + kPositionOffset, config.hidden);
  w.layers.resize(config.layers);
  for (LayerWeights& layer : w.layers) {
    norm(&layer.attention_norm);
    linear(&layer.qkv, Layout::kOutputRows, 3 * features);
    linear(&layer.out, Layout::kInputRows, features);
    norm(&layer.mlp_norm);
    linear(&layer.mlp.up, Layout::kOutputRows, shard.neuron_count);
    linear(&layer.mlp.down, Layout::kInputRows, shard.neuron_count);
  }
  norm(&w.final_norm);
  ASSIGN_OR_RETURN(w.storage_, layout.Allocate(backend));
  w.TieHead();
  return w;
}

// Without the biases of the keys, which the softmax takes out again: they add the same to every score of a query. In
// the cache they would take its range, or its precision.
void OptWeights::DropKeyBiases(Backend& backend) const {
  for (const LayerWeights& layer : layers) {
    const int64_t features = layer.qkv.bias.cols / 3;
    if (features == 0) continue;
    backend.Upload(layer.qkv.bias.Cols(features, features), std::vector<float>(features).data());
  }
  backend.Synchronize();
}

absl::StatusOr<int64_t> OptWeights::Measure(const Checkpoint& checkpoint, const OptConfig& config, const Shard& shard,
                                            std::optional<DType> dtype) {
  OptWeights weights;
  WeightPlan plan(checkpoint, config, shard, dtype);
  RETURN_IF_ERROR(plan.Make(&weights));
  return plan.layout().bytes();
}

absl::StatusOr<OptWeights> OptWeights::Load(const Checkpoint& checkpoint, const OptConfig& config, const Shard& shard,
                                            Backend& backend, const LoadProgress& progress,
                                            std::optional<DType> dtype) {
  OptWeights weights;
  WeightPlan plan(checkpoint, config, shard, dtype);
  RETURN_IF_ERROR(plan.Make(&weights));
  ASSIGN_OR_RETURN(weights.storage_, plan.layout().Allocate(backend));
  RETURN_IF_ERROR(WeightReader(plan, backend, progress).Read());
  weights.DropKeyBiases(backend);
  if (weights.head.weight.empty()) weights.TieHead();
  return weights;
}

}  // namespace dejavu
