// The fixture of the tests that hold every op of the CUDA backend against the CPU backend's, over the module under test
// and in three orders of blocks and threads (module_under_test.h). Where both add integers the results are the same bit
// by bit; elsewhere as close as two orders of a float sum are.
#ifndef TESTS_SIMT_CUDA_FIXTURE_H_
#define TESTS_SIMT_CUDA_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/params.h"
#include "tests/kernels/matrix.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {

using Layout = LinearWeights::Layout;
using Lists = std::vector<std::vector<int32_t>>;

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr DType kWeightTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8};

// Of a sum's absolute terms. What is multiplied is float32 in two halves, or rounded to 14 bits by the CPU.
float ToleranceOf(DType dtype);

// Tensors of a test on the host and their copies on the device.
class CudaBackendTest : public testing::TestWithParam<uint64_t> {
 protected:
  CudaBackendTest();

  Tensor Device(const Tensor& host);
  LinearWeights Device(LinearWeights w);
  MlpWeights Device(const MlpWeights& w) { return {Device(w.up), Device(w.down)}; }
  Selection Device(const Selection& s) {
    return {Device(s.indices), Device(s.count), Device(s.masks), Device(s.strict)};
  }
  Tensor Put(const Matrix& m) { return Device(arena_.Put(m)); }

  // A copy on the host.
  Tensor Host(const Tensor& device);
  Matrix Got(const Tensor& device) { return Get(Host(device)); }
  std::vector<int32_t> Ints(const Tensor& device);

  LinearWeights Weights(const Matrix& w, Layout layout, DType dtype, const Matrix& bias = {}, int64_t padding = 0) {
    return arena_.Weights(w, layout, dtype, bias, padding);
  }

  // Of host weights, [outputs, inputs].
  static Matrix ValuesOf(const LinearWeights& w);

  // What the terms of x W^T add up to without their signs.
  static Matrix MagnitudeOf(const Matrix& x, const LinearWeights& w);

  // Outputs that are left untouched are 77.
  Matrix LinearOn(Backend& backend, const Matrix& x, const LinearWeights& w, const Selection& selected = {},
                  int64_t group = 1);

  static void ExpectClose(const Matrix& got, const Matrix& want, const Matrix& magnitude, float tolerance);
  static void ExpectClose(const Matrix& got, const Matrix& want, float tolerance) {
    ExpectClose(got, want, Matrix(want.rows, want.cols, 1.0f), tolerance);
  }

  int64_t Launches(cuda::Kernel kernel) const { return simt::GetEmulation().launches[kernel]; }

  Arena arena_;
  std::unique_ptr<Backend> cuda_, cpu_;
  std::vector<Buffer> buffers_;
};

}  // namespace dejavu

#endif  // TESTS_SIMT_CUDA_FIXTURE_H_
