// How a synthetic model is made. Which neurons are active: densities.h.
//
// Up-projection. After its LayerNorm the input h of the MLP has mean 0 and variance 1, and so has w.h for a row of norm
// 1: neuron j is active with probability p_j if its bias is -z_j with P(N(0, 1) > z_j) = p_j. Rows are
//   w_j = rho * v_j + sqrt(1 - rho^2) * noise,   v_j = four of `rank` random directions, mixed with int8 weights
// so that the predictor, whose stage A is those directions and whose stage B the mixing weights, sees v_j.h, which
// correlates with w_j.h by rho. Thresholds then follow from the bivariate normal distribution.
//
// The rest. Projections into the residual stream are scaled so that attention adds kAttentionStep and the MLP kMlpStep
// of its norm: consecutive layers stay alike, as in real models, and the predictor may read what attention reads. The
// down-projection's bias takes out the mean of its output, which would make all tokens alike. The final norm changes
// the sign of half of the features: without that the tied head would always predict the token that it was given. The
// last MLP is louder than all before it: else x would predict y wherever y predicts x, the head being tied.
#include "engine/load/synthetic/generator.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "engine/load/synthetic/densities.h"
#include "engine/load/synthetic/in_parallel.h"
#include "engine/load/synthetic/noise.h"
#include "engine/load/synthetic/row_writer.h"
#include "engine/model/weight_convert.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr double kTapCosine = 0.998;  // of what the predictor and the MLP read, for contexts of a few tokens or more
constexpr double kWeightCorrelation = kSyntheticCorrelation / kTapCosine;
constexpr double kPositionDeviation = 0.15;  // of the tokens' embeddings
constexpr double kAttentionStep = 0.07;
constexpr double kMlpStep = 0.17;
constexpr double kLastMlpStep = 3.0;
constexpr double kLogitDeviation = 2.5;
constexpr int kDirectionsOfNeuron = 4;
constexpr float kDirectionScale = 20.0f;  // int8 values of a normal variate; beyond 6.3 deviations they would not fit

int32_t PredictorRank(int32_t hidden) { return hidden <= 4096 ? 128 : (hidden / 32 + 63) / 64 * 64; }

// Frequent and rare neurons lie in random order.
std::vector<SyntheticNeuron> NeuronsOf(const SyntheticModel& model, const NeuronTable& table, int32_t layer) {
  const std::vector<double> shares = SelectionShares(model, layer);
  std::vector<int32_t> order(shares.size());
  std::iota(order.begin(), order.end(), 0);
  const uint64_t key = NoiseKey(model.seed, NoisePart::kOrder, layer);
  for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[Scramble(key + i) % (i + 1)]);
  std::vector<SyntheticNeuron> neurons(shares.size());
  InParallel(static_cast<int64_t>(shares.size()), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) neurons[order[i]] = table.Of(shares[i]);
  });
  return neurons;
}

RowWriter::RowId From(int64_t first) {
  return [first](int64_t row) { return first + row; };
}

// Of the neurons' operating points, one for each of kSyntheticTiers.
using TierPoints = std::array<OperatingPoint*, kSyntheticTiers.size()>;

TierPoints AddPoints(int64_t ffn, SelectorData* selector) {
  TierPoints points;
  for (size_t i = 0; i < kSyntheticTiers.size(); ++i) {
    points[i] = &selector->points[static_cast<size_t>(kSyntheticTiers[i])].emplace();
    points[i]->rank = selector->rank;
    points[i]->thresholds.assign(ffn, 0.0f);
  }
  return points;
}

// What calibration would have measured.
void DescribePoints(const std::vector<SyntheticNeuron>& neurons, const TierPoints& points) {
  double mean_square = 0.0;
  for (const SyntheticNeuron& neuron : neurons) mean_square += neuron.mean_square;
  for (size_t i = 0; i < kSyntheticTiers.size(); ++i) {
    double selected = 0.0, missed = 0.0;
    for (const SyntheticNeuron& neuron : neurons) {
      selected += NormalTail(neuron.threshold[i]);
      missed += neuron.missed[i];
    }
    points[i]->density = selected / static_cast<double>(neurons.size());
    points[i]->missed_mass = points[i]->missed_share = std::clamp(missed / mean_square, 0.0, 1.0);
  }
}

class Generator {
 public:
  Generator(const SyntheticModel& model, const Shard& shard, Backend& backend, const LoadProgress& progress,
            int64_t total_bytes)
      : model_(model),
        config_(model.config),
        shard_(shard),
        backend_(backend),
        pool_(model.seed, model.config.hidden),
        table_(model.recall),
        writer_(pool_, backend, progress, total_bytes) {}

  absl::Status Embeddings(const OptWeights& w);
  absl::Status Layer(int32_t l, const LayerWeights& layer, LayerPredictorData* predictor);
  void Head(const OptWeights& w);

 private:
  RowWriter::RowId NeuronIds(int32_t l) const {
    return [this, l](int64_t row) { return shard_.neuron(l, static_cast<int32_t>(row)); };
  }
  uint64_t KeyOf(NoisePart part, int32_t layer = 0) const { return NoiseKey(model_.seed, part, layer); }
  absl::Status Attention(int32_t l, const LayerWeights& layer);
  std::vector<float> Directions(int32_t l, SelectorData* selector) const;
  double MixDirections(int32_t l, int64_t j, const std::vector<float>& directions, SelectorData* selector,
                       float* row) const;
  void AddNoise(int32_t l, int64_t j, double norm, float* row) const;
  absl::Status Up(int32_t l, const LinearWeights& up, const std::vector<SyntheticNeuron>& neurons,
                  LayerPredictorData* predictor);
  absl::Status Down(int32_t l, const LinearWeights& down, const std::vector<SyntheticNeuron>& neurons,
                    LayerPredictorData* predictor);
  void Fill(const Tensor& vector, float value) {
    if (!vector.empty()) backend_.Upload(vector, std::vector<float>(vector.cols, value).data());
  }
  void FillNorm(const NormWeights& norm) {
    Fill(norm.weight, 1.0f);
    Fill(norm.bias, 0.0f);
  }

  const SyntheticModel& model_;
  const OptConfig& config_;
  const Shard& shard_;
  Backend& backend_;
  const NoisePool pool_;
  const NeuronTable table_;
  RowWriter writer_;
  double residual_ = 1.0;  // deviation of the residual stream, as it grows from layer to layer
};

absl::Status Generator::Embeddings(const OptWeights& w) {
  RETURN_IF_ERROR(writer_.WriteNoise(w.token_embedding.weight, w.token_embedding.scale, From(shard_.vocab.first),
                                     KeyOf(NoisePart::kTokens), 1.0));
  return writer_.WriteNoise(w.position_embedding, {}, From(0), KeyOf(NoisePart::kPositions), kPositionDeviation);
}

absl::Status Generator::Layer(int32_t l, const LayerWeights& layer, LayerPredictorData* predictor) {
  FillNorm(layer.attention_norm);
  FillNorm(layer.mlp_norm);
  RETURN_IF_ERROR(Attention(l, layer));
  const std::vector<SyntheticNeuron> neurons = NeuronsOf(model_, table_, l);
  RETURN_IF_ERROR(Up(l, layer.mlp.up, neurons, predictor));
  RETURN_IF_ERROR(Down(l, layer.mlp.down, neurons, predictor));
  residual_ *= std::sqrt(1.0 + kAttentionStep * kAttentionStep + kMlpStep * kMlpStep);
  return absl::OkStatus();
}

absl::Status Generator::Attention(int32_t l, const LayerWeights& layer) {
  const double row_deviation = 1.0 / std::sqrt(static_cast<double>(config_.hidden));
  const int64_t first_feature = int64_t{shard_.heads.first} * config_.head_dim;
  const int64_t features = int64_t{shard_.heads.count} * config_.head_dim, hidden = config_.hidden;
  const auto of_qkv = [=](int64_t row) { return row / features * hidden + first_feature + row % features; };
  RETURN_IF_ERROR(
      writer_.WriteNoise(layer.qkv.weight, layer.qkv.scale, of_qkv, KeyOf(NoisePart::kQkv, l), row_deviation));
  RETURN_IF_ERROR(writer_.WriteNoise(layer.out.weight, layer.out.scale, From(first_feature), KeyOf(NoisePart::kOut, l),
                                     kAttentionStep * residual_ * row_deviation));
  Fill(layer.qkv.bias, 0.0f);
  Fill(layer.out.bias, 0.0f);
  return absl::OkStatus();
}

// [rank, hidden], of norm 1: exactly what stage A, which is filled here, holds.
std::vector<float> Generator::Directions(int32_t l, SelectorData* selector) const {
  const int64_t hidden = config_.hidden, rank = selector->rank;
  const uint64_t key = KeyOf(NoisePart::kDirections, l);
  selector->a.resize(rank * hidden);
  selector->a_scale.resize(rank);
  std::vector<float> directions(rank * hidden);
  for (int64_t k = 0; k < rank; ++k) {
    float* const direction = &directions[k * hidden];
    QuantiseRow(pool_.Row(key, k), hidden, kDirectionScale, &selector->a[k * hidden]);
    for (int64_t c = 0; c < hidden; ++c) direction[c] = selector->a[k * hidden + c];
    selector->a_scale[k] = 1.0f / std::sqrt(SumOfSquares(direction, hidden));
    for (int64_t c = 0; c < hidden; ++c) direction[c] *= selector->a_scale[k];
  }
  return directions;
}

// v_j into `row` [hidden] and its mixing weights into stage B; returns the norm of v_j. One direction of each group, so
// that they differ; weights from -127 to -64 and from 64 to 127.
double Generator::MixDirections(int32_t l, int64_t j, const std::vector<float>& directions, SelectorData* selector,
                                float* row) const {
  const int64_t hidden = config_.hidden, ffn = config_.ffn, group = selector->rank / kDirectionsOfNeuron;
  const uint64_t key = KeyOf(NoisePart::kMixing, l);
  const float* from[kDirectionsOfNeuron];
  float mixing[kDirectionsOfNeuron];
  for (int i = 0; i < kDirectionsOfNeuron; ++i) {
    const uint64_t random = Scramble(key + static_cast<uint64_t>(j * kDirectionsOfNeuron + i));
    const int64_t k = i * group + static_cast<int64_t>((random >> 8) % static_cast<uint64_t>(group));
    const int32_t weight = 64 + static_cast<int32_t>(random >> 32 & 63);
    const int32_t integer = (random & 1) != 0 ? weight : -weight;
    selector->b[k * ffn + j] = static_cast<int8_t>(integer);
    from[i] = &directions[k * hidden];
    mixing[i] = static_cast<float>(integer);
  }
  for (int64_t c = 0; c < hidden; ++c) {
    row[c] = mixing[0] * from[0][c] + mixing[1] * from[1][c] + mixing[2] * from[2][c] + mixing[3] * from[3][c];
  }
  return std::sqrt(SumOfSquares(row, hidden));
}

// w_j, of norm 1, from v_j of norm `norm`.
void Generator::AddNoise(int32_t l, int64_t j, double norm, float* row) const {
  const double rest = std::sqrt(1.0 - kWeightCorrelation * kWeightCorrelation);
  const int64_t hidden = config_.hidden;
  const uint64_t key = KeyOf(NoisePart::kUp, l);
  const auto of_row = static_cast<float>(kWeightCorrelation / norm);
  const auto of_noise = static_cast<float>(rest / std::sqrt(pool_.SquareOfRow(key, j, hidden)));
  const float* const noise = pool_.Row(key, j);
  for (int64_t c = 0; c < hidden; ++c) row[c] = of_row * row[c] + of_noise * noise[c];
  const float to_one = 1.0f / std::sqrt(SumOfSquares(row, hidden));
  for (int64_t c = 0; c < hidden; ++c) row[c] *= to_one;
}

absl::Status Generator::Up(int32_t l, const LinearWeights& up, const std::vector<SyntheticNeuron>& neurons,
                           LayerPredictorData* predictor) {
  const int64_t hidden = config_.hidden, ffn = config_.ffn;
  SelectorData& selector = predictor->neurons;
  predictor->tap = Tap::kAttentionNorm;
  selector.rank = PredictorRank(config_.hidden);
  selector.b.assign(selector.rank * ffn, 0);
  const std::vector<float> directions = Directions(l, &selector);
  const TierPoints points = AddPoints(ffn, &selector);
  RETURN_IF_ERROR(writer_.Write(up.weight, up.scale, NeuronIds(l), [&](int64_t j, char* values, float* scale) {
    thread_local std::vector<float> row;
    row.resize(hidden);
    const double norm = MixDirections(l, j, directions, &selector, row.data());
    AddNoise(l, j, norm, row.data());
    if (up.weight.dtype == DType::kInt8) {
      *scale = Int8Scale(LargestMagnitude(row.data(), hidden));
      QuantiseRow(row.data(), hidden, Int8Inverse(*scale), reinterpret_cast<int8_t*>(values));
    } else {
      CHECK(NarrowValues(row.data(), hidden, up.weight.dtype, values)) << "row " << j;
    }
    for (size_t i = 0; i < kSyntheticTiers.size(); ++i) {
      points[i]->thresholds[j] = static_cast<float>(norm * neurons[j].threshold[i]);
    }
  }));

  std::vector<float> bias(shard_.neuron_count);
  for (int32_t i = 0; i < shard_.neuron_count; ++i) bias[i] = static_cast<float>(-neurons[shard_.neuron(l, i)].z);
  backend_.Upload(up.bias, bias.data());
  DescribePoints(neurons, points);
  return absl::OkStatus();
}

absl::Status Generator::Down(int32_t l, const LinearWeights& down, const std::vector<SyntheticNeuron>& neurons,
                             LayerPredictorData* predictor) {
  const int64_t hidden = config_.hidden, ffn = config_.ffn;
  double variance = 0.0;
  for (const SyntheticNeuron& neuron : neurons) variance += neuron.mean_square - neuron.mean * neuron.mean;
  const double step = l == config_.layers - 1 ? kLastMlpStep : kMlpStep;
  const double deviation = step * residual_ / std::sqrt(variance);
  const uint64_t key = KeyOf(NoisePart::kDown, l);
  RETURN_IF_ERROR(writer_.WriteNoise(down.weight, down.scale, NeuronIds(l), key, deviation));
  predictor->worth.assign(ffn, 0.0f);
  for (int32_t i = 0; i < shard_.neuron_count; ++i) {
    const int32_t j = shard_.neuron(l, i);
    predictor->worth[j] = static_cast<float>(deviation * deviation * pool_.SquareOfRow(key, j, hidden));
  }
  if (down.bias.empty()) return absl::OkStatus();
  // Minus the mean of the output; by columns, so that the order of the sum does not depend on the threads.
  std::vector<float> bias(hidden, 0.0f);
  InParallel(hidden, [&](int64_t first, int64_t last) {
    for (int64_t j = 0; j < ffn; ++j) {
      const float* const row = pool_.Row(key, j);
      const auto mean = static_cast<float>(-deviation * neurons[j].mean);
      for (int64_t c = first; c < last; ++c) bias[c] += mean * row[c];
    }
  });
  backend_.Upload(down.bias, bias.data());
  return absl::OkStatus();
}

void Generator::Head(const OptWeights& w) {
  FillNorm(w.final_norm);
  const auto gain = static_cast<float>(kLogitDeviation / std::sqrt(static_cast<double>(config_.hidden)));
  std::vector<float> signs(config_.hidden);
  const uint64_t key = KeyOf(NoisePart::kSigns);
  for (size_t c = 0; c < signs.size(); ++c) signs[c] = (Scramble(key + c) & 1) != 0 ? gain : -gain;
  backend_.Upload(w.final_norm.weight, signs.data());
}

}  // namespace

PredictorData PredictorOutline(const SyntheticModel& model) {
  PredictorData outline;
  outline.tiers.assign(kSyntheticTiers.begin(), kSyntheticTiers.end());
  outline.layers.resize(model.config.layers);
  for (LayerPredictorData& layer : outline.layers) {
    layer.neurons.rank = PredictorRank(model.config.hidden);
    for (const Tier tier : kSyntheticTiers) {
      layer.neurons.points[static_cast<size_t>(tier)].emplace().rank = layer.neurons.rank;
    }
  }
  return outline;
}

SyntheticBytes BytesOf(const OptConfig& config, const Shard& shard, DType dtype) {
  const int64_t hidden = config.hidden, neurons = shard.neuron_count;
  const int64_t layer = 4 * hidden * shard.heads.count * config.head_dim + 2 * hidden * neurons;
  const int64_t embeddings = (int64_t{shard.vocab.count} + config.context) * hidden;
  return {(config.layers * layer + embeddings) * SizeOf(dtype),
          config.layers * PredictorRank(config.hidden) * (hidden + neurons)};
}

PredictorData StartPredictor(const SyntheticModel& model) {
  const NeuronTable table(model.recall);
  PredictorData predictor;
  predictor.weights_hash = model.Fingerprint();
  predictor.tiers.assign(kSyntheticTiers.begin(), kSyntheticTiers.end());
  predictor.report_json = R"({"synthetic": true})";
  for (int32_t l = 0; l < model.config.layers; ++l) {
    std::vector<float>& frequency = predictor.layers.emplace_back().frequency;
    for (const SyntheticNeuron& neuron : NeuronsOf(model, table, l)) {
      frequency.push_back(static_cast<float>(neuron.active));
    }
  }
  return predictor;
}

absl::StatusOr<OptWeights> GenerateModel(const SyntheticModel& model, const Shard& shard, DType dtype, Backend& backend,
                                         const LoadProgress& progress, PredictorData* predictor) {
  ASSIGN_OR_RETURN(OptWeights weights, OptWeights::Allocate(model.config, shard, dtype, backend));
  Generator generator(model, shard, backend, progress, weights.bytes());
  RETURN_IF_ERROR(generator.Embeddings(weights));
  for (int32_t l = 0; l < model.config.layers; ++l) {
    LayerPredictorData unwanted;
    RETURN_IF_ERROR(generator.Layer(l, weights.layers[l], predictor != nullptr ? &predictor->layers[l] : &unwanted));
  }
  generator.Head(weights);
  backend.Synchronize();
  return weights;
}

}  // namespace dejavu
