// CalibrationState: what a calibration has found so far, and its file, from which an interrupted one goes on. One
// thread at a time.
#ifndef ENGINE_CALIBRATION_CALIBRATION_STATE_H_
#define ENGINE_CALIBRATION_CALIBRATION_STATE_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/calibration/host_matrix.h"
#include "engine/calibration/layer_fit.h"
#include "engine/calibration/sensitivity.h"
#include "engine/model/predictor_data.h"
#include "engine/model_shape.h"

namespace dejavu {

struct CalibrationState {
  HostMatrix fisher;                            // [hidden, hidden]
  std::vector<LayerSensitivity> sensitivities;  // [layers]
  std::vector<LayerFit> fits;                   // [layers]
  std::vector<LayerPredictorData> facts;        // [layers] tap, worth and frequency; without worth: not fitted yet
};

// `settings`: all that a finished layer depends on.
absl::Status SaveState(const CalibrationState& state, const ModelShape& shape, const std::string& settings,
                       const std::string& path);

// `tap`: what predictors read. Any failure, such as a state of other settings, means that there is no state.
absl::StatusOr<CalibrationState> LoadState(const ModelShape& shape, Tap tap, const std::string& settings,
                                           const std::string& path);

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_CALIBRATION_STATE_H_
