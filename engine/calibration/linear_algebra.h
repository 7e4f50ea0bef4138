// The decompositions that calibration needs, by Eigen. Any thread.
#ifndef ENGINE_CALIBRATION_LINEAR_ALGEBRA_H_
#define ENGINE_CALIBRATION_LINEAR_ALGEBRA_H_

#include <cstdint>

#include "engine/calibration/host_matrix.h"

namespace dejavu {

// W [d, d] with (x - mean) W white for x of this covariance, to which ridge * trace / d is added on the diagonal.
HostMatrix WhiteningMatrix(const HostMatrix& covariance, double ridge);

// The `count` leading eigenvectors of a symmetric positive semidefinite matrix, as rows [count, d], by decreasing
// eigenvalue. Few of many by subspace iteration from a fixed start.
HostMatrix LeadingEigenvectors(Backend& backend, const HostMatrix& symmetric, int64_t count);

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_LINEAR_ALGEBRA_H_
