// What it costs in nats to miss a part of an MLP's output: by leaving out neurons at random and looking at the result,
// how far each layer's misses are worse or better than the Fisher information (fisher.h) says. CPU backend; one thread.
#ifndef ENGINE_CALIBRATION_SENSITIVITY_H_
#define ENGINE_CALIBRATION_SENSITIVITY_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/calibration/host_matrix.h"
#include "engine/calibration/window.h"
#include "engine/ranks/model_runner.h"

namespace dejavu {

// Nats per Fisher mass a^2 w2^T F w2 of a missed neuron.
struct LayerSensitivity {
  float heads = 1.0f;             // of heads that are left out
  float common = 1.0f;            // of the layer's neurons as a whole
  std::vector<float> per_neuron;  // [ffn] at least `common`; more for loud neurons that act through later attention
};

// `tokens_per_run`: how many to look at for each layer, and a quarter of them for each of its `loud` loudest neurons.
absl::StatusOr<std::vector<LayerSensitivity>> Sensitivities(ModelRunner& runner, const HostMatrix& fisher,
                                                            const std::vector<Window>& windows, int64_t tokens_per_run,
                                                            int32_t loud, const StepProgress& progress);

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_SENSITIVITY_H_
