#include "engine/calibration/window.h"

namespace dejavu {

absl::Status CalibrationStopped() { return absl::CancelledError("calibration was stopped"); }

absl::Span<const float> RunWindow(ModelRunner& runner, Window window, bool wants_logits) {
  Batch& batch = runner.StartBatch();
  for (size_t i = 0; i < window.size(); ++i) batch.AddRow(0, static_cast<int32_t>(i), window[i], wants_logits);
  return runner.Run();
}

}  // namespace dejavu
