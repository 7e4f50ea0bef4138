#include "engine/model/weight_bytes.h"

#include <optional>

namespace dejavu {
namespace {

int64_t BytesOf(const NormWeights& norm) { return norm.weight.bytes() + norm.bias.bytes(); }
int64_t BytesOf(const Tensor& weight, const Tensor& scale) { return weight.bytes() + scale.bytes(); }
int64_t BytesOf(const LinearWeights& linear) { return BytesOf(linear.weight, linear.scale) + linear.bias.bytes(); }

int64_t SelectorBytes(const SelectorData& selector, int32_t rank_a, int32_t rank_b, int64_t hidden, int64_t outputs) {
  using Row = decltype(selector.a)::value_type;
  using Scale = decltype(selector.a_scale)::value_type;
  const int64_t stage_a = rank_a * (hidden * sizeof(Row) + sizeof(Scale));
  const int64_t stage_b = rank_b * outputs * sizeof(Row);
  const int64_t thresholds = outputs * sizeof(uint16_t);  // float16
  return stage_a + stage_b + thresholds;
}

const std::optional<OperatingPoint>& PointOf(const SelectorData& selector, Tier tier) {
  return selector.points[static_cast<size_t>(tier)];
}

}  // namespace

LayerBytes::LayerBytes(const LayerWeights& weights, const ModelShape& shape) {
  const MlpWeights& w = weights.mlp;
  const int64_t neurons = w.up.weight.rows, heads = weights.out.weight.rows / shape.head_dim;
  up_row = BytesOf(w.up) / neurons;
  down_row = BytesOf(w.down.weight, w.down.scale) / neurons;
  down_bias = w.down.bias.bytes();
  mlp = BytesOf(w.up) + BytesOf(w.down);
  // Q, K and V have the same number of rows.
  if (heads > 0) head = (BytesOf(weights.qkv) / 3 + BytesOf(weights.out.weight, weights.out.scale)) / heads;
  rest = BytesOf(weights.attention_norm) + BytesOf(weights.mlp_norm) + BytesOf(weights.qkv) / 3 * 2 +
         weights.out.bias.bytes();
}

int64_t BytesAfterLayers(const OptWeights& weights) {
  return BytesOf(weights.final_norm) + BytesOf(weights.project_in) + BytesOf(weights.project_out) +
         BytesOf(weights.head);
}

int64_t EmbeddingBytes(const OptWeights& weights) {
  const EmbeddingWeights& tokens = weights.token_embedding;
  const int64_t scale = tokens.scale.empty() ? 0 : SizeOf(tokens.scale.dtype);
  return tokens.weight.Rows(0, 1).bytes() + scale + weights.position_embedding.Rows(0, 1).bytes();
}

int64_t NeuronPredictorBytes(const SelectorData& neurons, Tier tier, int64_t hidden, int64_t outputs) {
  const auto& point = PointOf(neurons, tier);
  return point.has_value() ? SelectorBytes(neurons, point->rank, point->rank, hidden, outputs) : 0;
}

int64_t HeadPredictorBytes(const SelectorData& heads, Tier tier, int64_t hidden, int64_t outputs) {
  const auto& point = PointOf(heads, tier);
  return point.has_value() ? SelectorBytes(heads, heads.rank, point->rank, hidden, outputs) : 0;
}

}  // namespace dejavu
