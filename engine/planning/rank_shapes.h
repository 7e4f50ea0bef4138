// RankShapes: the tensors that the largest rank of a group holds of a model, with shapes and no memory, and their
// bytes. The largest is rank 0: no rank has more. Plain data; any thread.
#ifndef ENGINE_PLANNING_RANK_SHAPES_H_
#define ENGINE_PLANNING_RANK_SHAPES_H_

#include <cstdint>

#include "engine/model/opt_config.h"
#include "engine/model/opt_weights.h"
#include "engine/model/predictor_data.h"
#include "engine/model/shard.h"
#include "kernels/layout.h"
#include "kernels/tensor.h"

namespace dejavu {

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

// Rank 0's part, without the ids of its neurons.
Shard FirstShard(const ModelShape& shape, int ranks);

// The tensors of rank 0's OptWeights, without memory.
class RankShapes {
 public:
  // Matrices are of type `dtype`; `stored` is the type of what int8 leaves as stored.
  RankShapes(const OptConfig& config, const Shard& shard, DType dtype, DType stored);

  const OptWeights& weights() const { return weights_; }
  RankWeights bytes() const { return {split_.bytes(), replicated_.bytes(), first_rank_.bytes()}; }

 private:
  void Layer(const OptConfig& config, const Shard& shard, LayerWeights* layer);
  void Matrix(DeviceLayout* layout, Tensor* weight, Tensor* scale, int64_t rows, int64_t cols) const;
  void Norm(NormWeights* norm, int64_t count);

  const DType dtype_;
  DeviceLayout split_, replicated_, first_rank_;
  OptWeights weights_;
};

RankPredictor PredictorBytes(const PredictorData& predictor, const ModelShape& shape, const Shard& shard);

}  // namespace dejavu

#endif  // ENGINE_PLANNING_RANK_SHAPES_H_
