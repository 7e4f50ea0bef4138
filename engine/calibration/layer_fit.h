// Fits the predictor of one layer: whitening, a low-rank map from the tap to the pre-activations, thresholds by
// expected cost and benefit, training, and the choice of rank for each tier. One thread per fit.
//
// The currency. Reading the up row of a neuron costs 1, its down row another 1 if it is active; a dense layer costs 2
// D. Missing a neuron with activation a costs sensitivity * a^2 * w2^T F w2 nats, where F is the Fisher information of
// the next-token distribution with respect to the residual stream, w2 the neuron's down row. A tier's mu says how many
// dense layers a nat is worth, the same for all layers, so that all of them give up quality at the same rate.
#ifndef ENGINE_CALIBRATION_LAYER_FIT_H_
#define ENGINE_CALIBRATION_LAYER_FIT_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "engine/calibration/half_rows.h"
#include "engine/calibration/host_matrix.h"
#include "engine/calibration/selector_trainer.h"
#include "kernels/backend.h"

namespace dejavu {

enum class FitMethod { kSvd, kWhitenedSvd, kRegression };

// What a pass over the text keeps of one layer.
struct LayerSample {
  HalfRows taps, inputs;                               // [samples, hidden] the tap, and the input of fc1
  HalfRows validation_taps, validation_inputs;         // of text that nothing is fitted to
  std::vector<float> head_mass, validation_head_mass;  // [samples, heads] Fisher mass of each head's output
  // Over all training tokens: sums, then means.
  int64_t tokens = 0;
  std::vector<double> tap_sum;    // [hidden]
  HostMatrix tap_tap, tap_input;  // [hidden, hidden] sums of outer products
};

// The weights and what a miss costs.
struct LayerProblem {
  int32_t layers = 0;  // of the model: a layer's bytes are this share of all
  LinearWeights up;
  HostMatrix down;                     // [ffn, hidden]
  const HostMatrix* fisher = nullptr;  // [hidden, hidden]
  std::vector<float> sensitivity;      // [ffn] nats per Fisher mass
  float common_sensitivity = 1.0f;
  int32_t heads = 0;
  float head_sensitivity = 1.0f;  // nats per Fisher mass of a head's output
};

struct FitOptions {
  FitMethod method = FitMethod::kRegression;
  std::vector<int32_t> ranks;  // to choose from, ascending
  std::vector<double> mus;     // one per tier, by falling quality
  double scan_epochs = 5.0;    // 0: no training
  double refine_epochs = 3.0;
};

struct LayerFit {
  FloatSelector neurons;  // in terms of the tap itself; a point of rank 0: the layer had better run EXACT
  FloatSelector heads;    // likewise; a point of rank 0: it had better compute every head
};

// `keep_going(done)`: false gives up; the result is then to be thrown away.
LayerFit FitLayer(Backend& backend, const LayerProblem& problem, const LayerSample& sample, const FitOptions& options,
                  const std::function<bool(double done)>& keep_going);

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_LAYER_FIT_H_
