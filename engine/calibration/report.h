// What a calibration found, for people. Any thread.
#ifndef ENGINE_CALIBRATION_REPORT_H_
#define ENGINE_CALIBRATION_REPORT_H_

#include <string>

#include "engine/model/predictor_file.h"

namespace dejavu {

// A table of the tiers and one of ranks and densities by layer.
std::string CalibrationTable(const PredictorData& data);

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_REPORT_H_
