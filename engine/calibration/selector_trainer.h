// SelectorTrainer: fine-tunes a low-rank selector by gradient descent on what its decisions cost. For a sample i and an
// output j (a neuron) the caller gives the gain g of computing j: what missing it would lose, less what reading it
// costs. Computing it is right where g > 0, and the loss is logistic with weight |g|:
//   h = A_r x,  s = h B_r + bias,  loss = sum |g| log(1 + exp(-sign(g) s))
// Tiers share A and B, of which each uses its first r rows, and have biases of their own; steps take turns among them.
// Adam (Kingma & Ba, arXiv 1412.6980), with step counts per component, because prefixes are not touched equally often.
// One thread.
#ifndef ENGINE_CALIBRATION_SELECTOR_TRAINER_H_
#define ENGINE_CALIBRATION_SELECTOR_TRAINER_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/types/span.h"
#include "engine/calibration/host_matrix.h"

namespace dejavu {

// A selector in training: output j is computed iff (A_r x) B_r + bias[j] > 0.
struct FloatSelector {
  struct Point {
    int32_t rank = 0;
    double mu = 0.0;          // how much a nat of loss weighs against the bytes of a dense layer
    std::vector<float> bias;  // [outputs]
  };
  HostMatrix a;  // [R, inputs]
  HostMatrix b;  // [R, outputs]
  std::vector<Point> points;
};

struct TrainingOptions {
  double epochs = 5.0;
  double learning_rate = 1e-2;
  uint32_t seed = 1;
};

// Fills gains [ids, outputs] for these samples at `mu`.
using GainFunction = std::function<void(absl::Span<const int32_t> ids, double mu, HostMatrix* gains)>;

// `x` [samples, inputs], best white. `keep_going` is asked now and then; false ends the training early.
void TrainSelector(Backend& backend, const HostMatrix& x, const GainFunction& gains, const TrainingOptions& options,
                   const std::function<bool(double done)>& keep_going, FloatSelector* selector);

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_SELECTOR_TRAINER_H_
