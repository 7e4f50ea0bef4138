// What the passes of a calibration over its text have in common: a window of tokens, run as one prompt, and the ways to
// watch and to stop it. One thread.
#ifndef ENGINE_CALIBRATION_WINDOW_H_
#define ENGINE_CALIBRATION_WINDOW_H_

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/model/opt_model.h"
#include "engine/ranks/model_runner.h"

namespace dejavu {

using Window = absl::Span<const int32_t>;
using StepProgress = std::function<bool(double done)>;  // false: stop, CANCELLED

absl::Status CalibrationStopped();

// Runs a window as one prompt. With `wants_logits` it returns those of every position, [window, vocab], until the next
// run.
absl::Span<const float> RunWindow(ModelRunner& runner, Window window, bool wants_logits);

// Detaches the observer from the model however the function ends.
class Observing {
 public:
  Observing(ModelRunner& runner, ModelObserver* observer) : runner_(runner) { runner_.model().set_observer(observer); }
  ~Observing() { runner_.model().set_observer(nullptr); }

 private:
  ModelRunner& runner_;
};

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_WINDOW_H_
