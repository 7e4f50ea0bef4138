#include "tests/engine/made_predictor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "engine/formats/checkpoint.h"
#include "engine/model/predictor_file.h"
#include "engine/model/weights_hash.h"
#include "kernels/base/check.h"
#include "kernels/base/float16.h"

namespace dejavu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

SelectorData MakeSelector(int32_t rank, int32_t hidden, int32_t outputs, std::mt19937* random) {
  std::uniform_int_distribution<int> byte(-127, 127);
  std::uniform_int_distribution<int> jitter(-500, 500);
  SelectorData selector;
  selector.rank = rank;
  for (int32_t i = 0; i < rank * hidden; ++i) selector.a.push_back(static_cast<int8_t>(byte(*random)));
  for (int32_t i = 0; i < rank; ++i) selector.a_scale.push_back(i % 2 == 0 ? 0x1p-6f : 0x1p-7f);
  for (int32_t i = 0; i < rank * outputs; ++i) selector.b.push_back(static_cast<int8_t>(byte(*random)));
  for (const Tier tier : {Tier::kHigh, Tier::kBalanced, Tier::kFast}) {
    const int step = static_cast<int>(tier) - static_cast<int>(Tier::kBalanced);  // -1, 0, 1
    OperatingPoint& point = selector.points[static_cast<size_t>(tier)].emplace();
    point.rank = rank - 1 - step;
    for (int32_t j = 0; j < outputs; ++j) {
      const auto threshold = static_cast<float>(1500 * step + jitter(*random));
      point.thresholds.push_back(FloatFromFloat16(Float16FromFloat(threshold)));
    }
  }
  return selector;
}

}  // namespace

OptConfig ConfigOf(int32_t layers, int32_t hidden, int32_t heads, int32_t ffn) {
  OptConfig config;
  config.layers = layers;
  config.hidden = hidden;
  config.heads = heads;
  config.head_dim = hidden / heads;
  config.ffn = ffn;
  return config;
}

PredictorData MakePredictor(const OptConfig& config, Tap tap, uint32_t seed) {
  std::mt19937 random(seed);
  PredictorData data;
  data.tap = tap;
  data.tiers = {Tier::kHigh, Tier::kBalanced, Tier::kFast};
  data.report_json = "{}";
  for (int32_t l = 0; l < config.layers; ++l) {
    LayerPredictorData& layer = data.layers.emplace_back();
    layer.tap = tap == Tap::kPreviousLayer && l == 0 ? Tap::kAttentionNorm : tap;
    layer.neurons = MakeSelector(kMadeNeuronRank, config.hidden, config.ffn, &random);
    if (tap != Tap::kMlpNorm) layer.heads = MakeSelector(kMadeHeadRank, config.hidden, config.heads, &random);
    layer.worth.assign(config.ffn, 1.0f);
    layer.frequency.assign(config.ffn, 0.5f);
  }
  return data;
}

void SetThresholds(float threshold, SelectorData* selector) {
  for (auto& point : selector->points) {
    if (point.has_value()) std::fill(point->thresholds.begin(), point->thresholds.end(), threshold);
  }
}

void SelectOnly(const std::vector<int32_t>& outputs, Tier tier, SelectorData* selector) {
  std::vector<float>& thresholds = selector->points[static_cast<size_t>(tier)].value().thresholds;
  std::fill(thresholds.begin(), thresholds.end(), kInfinity);
  for (const int32_t output : outputs) thresholds.at(output) = -kInfinity;
}

void SetMissed(double share, SelectorData* selector) {
  for (auto& point : selector->points) {
    if (point.has_value()) point->missed_share = share;
  }
}

std::string WeightsHashOf(const std::string& model) {
  return WeightsHash(Checkpoint::Open(model).value(), OptConfig::Load(model).value()).value();
}

PredictorData ReadPredictorOf(const std::string& model) {
  return ReadPredictor(model + "/predictor.safetensors", OptConfig::Load(model).value(), WeightsHashOf(model)).value();
}

std::string WritePredictorFor(const std::string& model, PredictorData data, const std::string& path) {
  data.weights_hash = WeightsHashOf(model);
  const absl::Status status = WritePredictor(data, OptConfig::Load(model).value(), path);
  CHECK(status.ok()) << status.ToString();
  return path;
}

void Spoil(int32_t layer, PredictorData* data) {
  std::mt19937 random(layer);
  std::uniform_int_distribution<int> byte(-127, 127);
  for (int8_t& b : data->layers.at(layer).neurons.b) b = static_cast<int8_t>(byte(random));
}

PlainSelection SelectPlainly(const SelectorData& selector, const OperatingPoint& point, const float* x,
                             int32_t hidden) {
  // Both stages round what they multiply with int8 to integers; the largest becomes 8192 at least.
  constexpr double kStep = 1.0 / 8192;
  const size_t outputs = point.thresholds.size();
  double largest_x = 0.0, largest_a = 0.0;
  for (int32_t i = 0; i < hidden; ++i) largest_x = std::max(largest_x, std::abs(double{x[i]}));
  std::vector<double> a(point.rank, 0.0), rounding(point.rank, 0.0);
  for (int32_t k = 0; k < point.rank; ++k) {
    for (int32_t i = 0; i < hidden; ++i) {
      const double weight = double{selector.a_scale[k]} * selector.a[static_cast<size_t>(k) * hidden + i];
      a[k] += x[i] * weight;
      rounding[k] += 0.51 * kStep * largest_x * std::abs(weight);
    }
    largest_a = std::max(largest_a, std::abs(a[k]) + rounding[k]);
  }
  PlainSelection result;
  for (size_t j = 0; j < outputs; ++j) {
    double sum = 0.0, error = 0.0;
    for (int32_t k = 0; k < point.rank; ++k) {
      const double b = selector.b[k * outputs + j], term = a[k] * b;
      sum += term;
      error += 3e-5 * std::abs(term) + (rounding[k] + 0.51 * kStep * largest_a) * std::abs(b);
    }
    result.selected.push_back(sum > point.thresholds[j]);
    result.close.push_back(std::abs(sum - point.thresholds[j]) < error);
    result.count += result.selected.back();
    result.close_count += result.close.back();
  }
  return result;
}

}  // namespace dejavu
