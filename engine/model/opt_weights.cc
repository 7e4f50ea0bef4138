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
#include "engine/model/weight_tensors.h"
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
  OptWeights w;
  DeviceLayout layout;
  for (const WeightTensor& tensor : TensorsOf(config, shard, /*has_own_head=*/false, &w)) {
    const bool stays = tensor.scale == nullptr && dtype == DType::kInt8;
    const DType type = tensor.is_vector ? DType::kFloat32 : stays ? DType::kBFloat16 : dtype;
    layout.Reserve(tensor.view, type, tensor.own_rows(), tensor.own_cols());
    if (type == DType::kInt8) layout.Reserve(tensor.scale, DType::kFloat32, 1, tensor.own_rows());
  }
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
