// Host matrices and the plain versions of the kernels that tests compare with: double precision, one loop per sum.
#ifndef TESTS_KERNELS_MATRIX_H_
#define TESTS_KERNELS_MATRIX_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/backend.h"

namespace dejavu {

struct Matrix {
  Matrix() = default;
  Matrix(int64_t r, int64_t c, float value = 0.0f) : rows(r), cols(c), values(r * c, value) {}

  float& at(int64_t r, int64_t c) { return values[r * cols + c]; }
  float at(int64_t r, int64_t c) const { return values[r * cols + c]; }

  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<float> values;  // [rows, cols]
};

// Uniform in -1 ... 1, the same for the same seed.
Matrix Random(int64_t rows, int64_t cols, uint32_t seed);
Matrix Transposed(const Matrix& m);

float Float16Value(uint16_t bits);

// Memory that tensors of a test lie in, one exact heap block each so that AddressSanitizer sees any read past an end.
class Arena {
 public:
  // A packed tensor, or one whose rows lie `stride` elements apart.
  Tensor Make(DType dtype, int64_t rows, int64_t cols, int64_t stride = 0);
  // Rounds to `dtype`; the values are at most 65504.
  Tensor Put(const Matrix& m, DType dtype = DType::kFloat32, int64_t stride = 0);
  Tensor PutInts(const std::vector<int32_t>& values);
  Selection Select(const std::vector<int32_t>& indices);

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
};

// What a tensor of any type holds.
Matrix Get(const Tensor& t);

// x W^T + b, W [outputs, inputs]; `magnitude` receives the sum of the terms' absolute values.
Matrix ReferenceLinear(const Matrix& x, const Matrix& w, const Matrix& bias, Matrix* magnitude);

}  // namespace dejavu

#endif  // TESTS_KERNELS_MATRIX_H_
