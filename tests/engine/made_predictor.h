// Predictors made for a test, whose stages and thresholds it knows, and what a predictor selects, worked out plainly.
#ifndef TESTS_ENGINE_MADE_PREDICTOR_H_
#define TESTS_ENGINE_MADE_PREDICTOR_H_

#include <cstdint>
#include <string>
#include <vector>

#include "engine/model/opt_config.h"
#include "engine/model/predictor_data.h"

namespace dejavu {

inline constexpr int32_t kMadeNeuronRank = 6, kMadeHeadRank = 3;

// A model's shape, for tests that need a predictor and no model.
OptConfig ConfigOf(int32_t layers, int32_t hidden, int32_t heads, int32_t ffn);

// Random stages in every layer, for neurons and, but at the MLP's input, for heads. HIGH, BALANCED and FAST select
// about three quarters, half and a quarter, each with fewer components than the one before. For inputs that are
// integers of at most 4, and up to 20 of them, every sum is exact.
PredictorData MakePredictor(const OptConfig& config, Tap tap, uint32_t seed);

// In every tier of `selector`.
void SetThresholds(float threshold, SelectorData* selector);
// Those outputs always, the others never.
void SelectOnly(const std::vector<int32_t>& outputs, Tier tier, SelectorData* selector);
// OperatingPoint::missed_share of every point, to which shadow checks are held; 0 where a test says nothing.
void SetMissed(double share, SelectorData* selector);

std::string WeightsHashOf(const std::string& model);
PredictorData ReadPredictorOf(const std::string& model);
// For the model in that directory; returns `path`.
std::string WritePredictorFor(const std::string& model, PredictorData data, const std::string& path);
// A random stage B for the neurons of `layer`.
void Spoil(int32_t layer, PredictorData* data);

// What `point` selects for the tap x [hidden], in double precision. `close`: so near its threshold that rounding
// decides.
struct PlainSelection {
  std::vector<bool> selected, close;  // [outputs]
  int32_t count = 0;
  int32_t close_count = 0;
};
PlainSelection SelectPlainly(const SelectorData& selector, const OperatingPoint& point, const float* x, int32_t hidden);

}  // namespace dejavu

#endif  // TESTS_ENGINE_MADE_PREDICTOR_H_
