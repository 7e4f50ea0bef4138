// What it costs in nats to miss a part of an MLP's output: the Fisher information of the next-token distribution with
// respect to the residual stream, and, by leaving out neurons at random and looking at the result, how far each layer's
// misses are worse or better than that says. CPU backend; one thread.
#ifndef ENGINE_CALIBRATION_SENSITIVITY_H_
#define ENGINE_CALIBRATION_SENSITIVITY_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/calibration/matrix.h"
#include "engine/ranks/model_runner.h"

namespace dejavu {

using Window = absl::Span<const int32_t>;
using StepProgress = std::function<bool(double done)>;  // false: stop, CANCELLED

// F = E[g g^T] [hidden, hidden], g the gradient of log p(y) with respect to the residual stream after the last layer, y
// drawn from p. To first order KL = e^T F e / 2 ... for an error e that reaches the head unchanged; Sensitivity finds
// the factor.
absl::StatusOr<Matrix> FisherInformation(ModelRunner& runner, const std::vector<Window>& windows,
                                         const StepProgress& progress);

// The Fisher mass of a head's output, (W c)^T F (W c), c being its part of the context and W of the out-projection.
class HeadMetric {
 public:
  HeadMetric(Backend& backend, const LinearWeights& out, const Matrix& fisher, int32_t heads);
  // `context`: [heads * head_dim] of one row.
  double Mass(int32_t head, const float* context) const;
  int32_t heads() const { return static_cast<int32_t>(metrics_.size()); }

 private:
  int64_t head_dim_ = 0;
  std::vector<Matrix> metrics_;  // by head [head_dim, head_dim] W^T F W
};

// Nats per Fisher mass a^2 w2^T F w2 of a missed neuron.
struct LayerSensitivity {
  float heads = 1.0f;             // of heads that are left out
  float common = 1.0f;            // of the layer's neurons as a whole
  std::vector<float> per_neuron;  // [ffn] at least `common`; more for loud neurons that act through later attention
};

// `tokens_per_run`: how many to look at for each layer, and a quarter of them for each of its `loud` loudest neurons.
absl::StatusOr<std::vector<LayerSensitivity>> Sensitivities(ModelRunner& runner, const Matrix& fisher,
                                                            const std::vector<Window>& windows, int64_t tokens_per_run,
                                                            int32_t loud, const StepProgress& progress);

// The rows of a layer's down-projection as floats, [ffn, hidden].
Matrix DownRows(Backend& backend, const LinearWeights& down);

// row^T F row for each row of `down`: the Fisher mass of a unit activation.
std::vector<float> FisherMasses(Backend& backend, const Matrix& down, const Matrix& fisher);

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_SENSITIVITY_H_
