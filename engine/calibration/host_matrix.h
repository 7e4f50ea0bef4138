// HostMatrix: float32 values on the host that the CPU backend can read as a Tensor.
#ifndef ENGINE_CALIBRATION_HOST_MATRIX_H_
#define ENGINE_CALIBRATION_HOST_MATRIX_H_

#include <cstdint>
#include <vector>

#include "kernels/backend.h"

namespace dejavu {

struct HostMatrix {
  HostMatrix() = default;
  HostMatrix(int64_t r, int64_t c) : rows(r), cols(c), values(static_cast<size_t>(r * c), 0.0f) {}

  float* row(int64_t r) { return values.data() + r * cols; }
  const float* row(int64_t r) const { return values.data() + r * cols; }
  Tensor tensor() const { return {const_cast<float*>(values.data()), DType::kFloat32, rows, cols, cols}; }
  bool empty() const { return values.empty(); }

  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<float> values;  // [rows, cols]
};

inline HostMatrix Transposed(const HostMatrix& m) {
  HostMatrix t(m.cols, m.rows);
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t c = 0; c < m.cols; ++c) t.row(c)[r] = m.row(r)[c];
  }
  return t;
}

// Products on the backend's kernels: y = a b, and y = a b^T.
inline void Multiply(Backend& backend, const Tensor& a, const Tensor& b, Tensor y) {
  LinearWeights w;
  w.layout = LinearWeights::Layout::kInputRows;
  w.weight = b;
  backend.Linear(y, a, w);
}
inline void MultiplyTransposed(Backend& backend, const Tensor& a, const Tensor& b, Tensor y) {
  LinearWeights w;
  w.weight = b;
  backend.Linear(y, a, w);
}
inline HostMatrix Product(Backend& backend, const HostMatrix& a, const HostMatrix& b) {
  HostMatrix y(a.rows, b.cols);
  Multiply(backend, a.tensor(), b.tensor(), y.tensor());
  return y;
}

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_HOST_MATRIX_H_
