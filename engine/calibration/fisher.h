// Fisher information: what an error in the residual stream costs in nats of the next-token distribution, to first
// order, and the masses of neurons and heads by it. CPU backend; one thread.
#ifndef ENGINE_CALIBRATION_FISHER_H_
#define ENGINE_CALIBRATION_FISHER_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/calibration/host_matrix.h"
#include "engine/calibration/window.h"
#include "engine/ranks/model_runner.h"

namespace dejavu {

// F = E[g g^T] [hidden, hidden], g the gradient of log p(y) with respect to the residual stream after the last layer, y
// drawn from p. To first order KL = e^T F e / 2 ... for an error e that reaches the head unchanged; Sensitivity finds
// the factor.
absl::StatusOr<HostMatrix> FisherInformation(ModelRunner& runner, const std::vector<Window>& windows,
                                             const StepProgress& progress);

// The Fisher mass of a head's output, (W c)^T F (W c), c being its part of the context and W of the out-projection.
class HeadMetric {
 public:
  HeadMetric(Backend& backend, const LinearWeights& out, const HostMatrix& fisher, int32_t heads);
  // `context`: [heads * head_dim] of one row.
  double Mass(int32_t head, const float* context) const;
  int32_t heads() const { return static_cast<int32_t>(metrics_.size()); }

 private:
  int64_t head_dim_ = 0;
  std::vector<HostMatrix> metrics_;  // by head [head_dim, head_dim] W^T F W
};

// The rows of a layer's down-projection as floats, [ffn, hidden].
HostMatrix DownRows(Backend& backend, const LinearWeights& down);

// row^T F row for each row of `down`: the Fisher mass of a unit activation.
std::vector<float> FisherMasses(Backend& backend, const HostMatrix& down, const HostMatrix& fisher);

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_FISHER_H_
