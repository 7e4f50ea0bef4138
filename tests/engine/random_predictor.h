// Predictors with random stages, so that a test can say what a tier selects, or spoil one thing at a time.
#ifndef TESTS_ENGINE_RANDOM_PREDICTOR_H_
#define TESTS_ENGINE_RANDOM_PREDICTOR_H_

#include <cstdint>
#include <string>

#include "engine/model/opt_config.h"
#include "engine/model/predictor_data.h"

namespace dejavu {

inline constexpr int32_t kRandomNeuronRank = 6;
inline constexpr int32_t kRandomHeadRank = 3;

// Serves HIGH, BALANCED and FAST at thresholds that rise, so that each selects fewer neurons than the one before; heads
// in BALANCED and FAST, where FAST has a smaller rank than the file.
PredictorData RandomPredictor(const OptConfig& config, const std::string& weights_hash, uint32_t seed);

// All thresholds of every operating point.
void SetThresholds(float threshold, PredictorData* data);
// Neurons (heads) below `count` always, the others never.
void SelectTheFirst(int32_t count, SelectorData* selector);

// Only frequencies, by which neurons are dealt.
PredictorData RandomFrequencies(const OptConfig& config, uint32_t seed);

}  // namespace dejavu

#endif  // TESTS_ENGINE_RANDOM_PREDICTOR_H_
