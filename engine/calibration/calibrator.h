// Calibrate: makes a predictor for a model from the model itself and some text. It runs the text through the served
// engine and fits each layer to what it sees (layer_fit.h); memory does not grow with the text. CPU backend; one thread
// calls, more are started to fit layers side by side.
#ifndef ENGINE_CALIBRATION_CALIBRATOR_H_
#define ENGINE_CALIBRATION_CALIBRATOR_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "engine/calibration/layer_fit.h"
#include "engine/model/predictor_data.h"

namespace dejavu {

struct CalibrationOptions {
  std::string model;   // directory in Hugging Face layout
  int threads = 0;     // 0: one per CPU
  int window = 256;    // tokens of a window, at most the model's context
  int64_t tokens = 0;  // to fit to; 0: 49,152, for wide models 16,384. Validation takes a sixth as many beside them
  FitMethod method = FitMethod::kRegression;
  Tap tap = Tap::kAttentionNorm;
  bool train = true;          // fine-tune the regression by gradient descent
  bool heads = true;          // skip heads where that pays
  int64_t memory_mib = 1536;  // to use beside the weights
  // Mean KL(DENSE || tier), in nats per token, that each predicted tier may cost. About the relative change of the
  // perplexity.
  std::vector<double> kl_targets = {0.0018, 0.0065, 0.018};
  std::string state_file;         // finished layers are kept there, and taken from there if they fit; empty: nowhere
  uint64_t text_fingerprint = 0;  // tells states of other texts apart
};

// A line of progress: which part of the work, and how far it is.
struct CalibrationStep {
  absl::string_view name;
  double done = 0.0;  // of this step
};
// Returning false stops the calibration with CANCELLED. From any thread, one at a time.
using CalibrationProgress = std::function<bool(const CalibrationStep& step)>;

// `tokens`: the text. The last quarter is kept for validation. INVALID_ARGUMENT for too short a text.
absl::StatusOr<PredictorData> Calibrate(const CalibrationOptions& options, absl::Span<const int32_t> tokens,
                                        const CalibrationProgress& progress);

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_CALIBRATOR_H_
