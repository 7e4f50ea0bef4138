// What a calibration found, for the predictor's file and for people. Any thread.
#ifndef ENGINE_CALIBRATION_REPORT_H_
#define ENGINE_CALIBRATION_REPORT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "engine/calibration/tier_tuner.h"
#include "engine/eval/evaluation.h"
#include "engine/model/predictor_data.h"

namespace dejavu {

// For PredictorData::report_json.
std::string CalibrationJson(const Evaluation& evaluation, const PredictorData& data,
                            const std::vector<TierChoice>& choices, int64_t training_tokens);

// A table of the tiers and one of ranks and densities by layer, of a predictor with that report.
std::string CalibrationTable(const PredictorData& data);

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_REPORT_H_
