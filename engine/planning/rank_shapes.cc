#include "engine/planning/rank_shapes.h"

#include <algorithm>
#include <utility>

namespace dejavu {
namespace {

void Vector(DeviceLayout* layout, Tensor* view, int64_t count) {
  if (count > 0) layout->Reserve(view, DType::kFloat32, 1, count);
}

}  // namespace

Shard FirstShard(const ModelShape& shape, int ranks) {
  Shard shard = Shard::Whole(shape);
  shard.ranks = ranks;
  const auto largest = [&](int32_t count) { return (count + ranks - 1) / ranks; };
  shard.heads.count = largest(shape.heads);
  shard.vocab.count = largest(shape.vocab);
  shard.neuron_count = largest(shape.ffn);
  return shard;
}

RankShapes::RankShapes(const OptConfig& config, const Shard& shard, DType dtype, DType stored) : dtype_(dtype) {
  OptWeights& w = weights_;
  Matrix(&split_, &w.token_embedding.weight, &w.token_embedding.scale, shard.vocab.count, config.embed);
  // int8 leaves it as stored.
  replicated_.Reserve(&w.position_embedding, dtype == DType::kInt8 ? stored : dtype, kPositionOffset + config.context,
                      config.hidden);
  if (config.embed != config.hidden) {
    Matrix(&replicated_, &w.project_in.weight, &w.project_in.scale, config.hidden, config.embed);
    Matrix(&replicated_, &w.project_out.weight, &w.project_out.scale, config.embed, config.hidden);
  }
  w.layers.resize(config.layers);
  for (LayerWeights& layer : w.layers) Layer(config, shard, &layer);
  if (config.final_norm) Norm(&w.final_norm, config.hidden);
  if (config.tied) {
    w.head.weight = w.token_embedding.weight;
    w.head.scale = w.token_embedding.scale;
  } else {
    Matrix(&split_, &w.head.weight, &w.head.scale, shard.vocab.count, config.embed);
  }
}

void RankShapes::Layer(const OptConfig& config, const Shard& shard, LayerWeights* layer) {
  using Layout = LinearWeights::Layout;
  const int64_t hidden = config.hidden, features = int64_t{shard.heads.count} * config.head_dim;
  const int64_t biases = config.biases ? 1 : 0;
  MlpWeights& mlp = layer->mlp;
  for (NormWeights* norm : {&layer->attention_norm, &layer->mlp_norm}) Norm(norm, hidden);
  layer->qkv.layout = mlp.up.layout = Layout::kOutputRows;
  layer->out.layout = mlp.down.layout = Layout::kInputRows;
  Matrix(&split_, &layer->qkv.weight, &layer->qkv.scale, 3 * features, hidden);
  Matrix(&split_, &layer->out.weight, &layer->out.scale, features, hidden);
  Matrix(&split_, &mlp.up.weight, &mlp.up.scale, shard.neuron_count, hidden);
  Matrix(&split_, &mlp.down.weight, &mlp.down.scale, shard.neuron_count, hidden);
  Vector(&split_, &layer->qkv.bias, biases * 3 * features);
  Vector(&split_, &mlp.up.bias, biases * shard.neuron_count);
  Vector(&first_rank_, &layer->out.bias, biases * hidden);
  Vector(&first_rank_, &mlp.down.bias, biases * hidden);
}

void RankShapes::Matrix(DeviceLayout* layout, Tensor* weight, Tensor* scale, int64_t rows, int64_t cols) const {
  layout->Reserve(weight, dtype_, rows, cols);
  if (dtype_ == DType::kInt8) Vector(layout, scale, rows);
}

void RankShapes::Norm(NormWeights* norm, int64_t count) {
  Vector(&replicated_, &norm->weight, count);
  Vector(&replicated_, &norm->bias, count);
}

RankPredictor PredictorBytes(const PredictorData& predictor, const ModelShape& shape, const Shard& shard) {
  RankPredictor bytes;
  for (const LayerPredictorData& layer : predictor.layers) {
    const std::pair<const SelectorData*, int64_t> selectors[] = {{&layer.heads, shard.heads.count},
                                                                 {&layer.neurons, shard.neuron_count}};
    for (const auto& [selector, outputs] : selectors) {
      if (selector->rank == 0) continue;
      const auto points = std::count_if(selector->points.begin(), selector->points.end(),
                                        [](const auto& point) { return point.has_value(); });
      bytes.replicated += selector->rank * (shape.hidden + static_cast<int64_t>(sizeof(float)));
      bytes.split += outputs * (selector->rank + points * static_cast<int64_t>(sizeof(uint16_t)));
    }
    if (layer.heads.rank + layer.neurons.rank > 0) bytes.split += shard.neuron_count * int64_t{sizeof(float)};  // worth
  }
  return bytes;
}

}  // namespace dejavu
