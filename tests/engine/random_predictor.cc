#include "tests/engine/random_predictor.h"

#include <limits>
#include <random>
#include <vector>

namespace dejavu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

SelectorData RandomSelector(int32_t rank, int32_t hidden, int32_t outputs, std::mt19937* random) {
  std::uniform_int_distribution<int> bytes(-127, 127);
  SelectorData selector;
  selector.rank = rank;
  for (int32_t i = 0; i < rank * hidden; ++i) selector.a.push_back(static_cast<int8_t>(bytes(*random)));
  for (int32_t i = 0; i < rank * outputs; ++i) selector.b.push_back(static_cast<int8_t>(bytes(*random)));
  for (int32_t i = 0; i < rank; ++i) selector.a_scale.push_back(0x1p-12f * static_cast<float>(i + 1));
  return selector;
}

// `threshold` is a float16 value.
void AddPoint(Tier tier, int32_t rank, float threshold, int32_t outputs, SelectorData* selector) {
  OperatingPoint& point = selector->points[static_cast<size_t>(tier)].emplace();
  point = {rank, std::vector<float>(outputs, threshold), 0.015625, 0.03125, 0.25};
}

}  // namespace

PredictorData RandomPredictor(const OptConfig& config, const std::string& weights_hash, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> positive(0.5f, 1.5f);
  PredictorData data;
  data.weights_hash = weights_hash;
  data.tiers = {Tier::kHigh, Tier::kBalanced, Tier::kFast};
  data.report_json = R"({"text":"random"})";
  for (int32_t l = 0; l < config.layers; ++l) {
    LayerPredictorData& layer = data.layers.emplace_back();
    layer.neurons = RandomSelector(kRandomNeuronRank, config.hidden, config.ffn, &random);
    AddPoint(Tier::kHigh, kRandomNeuronRank, -4.0f, config.ffn, &layer.neurons);
    AddPoint(Tier::kBalanced, kRandomNeuronRank, 0.0f, config.ffn, &layer.neurons);
    AddPoint(Tier::kFast, kRandomNeuronRank - 2, 2.0f, config.ffn, &layer.neurons);
    layer.heads = RandomSelector(kRandomHeadRank, config.hidden, config.heads, &random);
    AddPoint(Tier::kBalanced, kRandomHeadRank, -2.0f, config.heads, &layer.heads);
    AddPoint(Tier::kFast, kRandomHeadRank - 1, 0.0f, config.heads, &layer.heads);
    for (int32_t j = 0; j < config.ffn; ++j) {
      layer.worth.push_back(positive(random));
      layer.frequency.push_back(0.5f);
    }
  }
  return data;
}

void SetThresholds(float threshold, PredictorData* data) {
  for (LayerPredictorData& layer : data->layers) {
    for (SelectorData* selector : {&layer.neurons, &layer.heads}) {
      for (auto& point : selector->points) {
        if (point.has_value()) point->thresholds.assign(point->thresholds.size(), threshold);
      }
    }
  }
}

void SelectTheFirst(int32_t count, SelectorData* selector) {
  for (auto& point : selector->points) {
    if (!point.has_value()) continue;
    for (size_t j = 0; j < point->thresholds.size(); ++j) {
      point->thresholds[j] = static_cast<int32_t>(j) < count ? -kInfinity : kInfinity;
    }
  }
}

PredictorData RandomFrequencies(const OptConfig& config, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  PredictorData data;
  for (int32_t l = 0; l < config.layers; ++l) {
    std::vector<float>& frequency = data.layers.emplace_back().frequency;
    for (int32_t j = 0; j < config.ffn; ++j) frequency.push_back(uniform(random));
  }
  return data;
}

}  // namespace dejavu
