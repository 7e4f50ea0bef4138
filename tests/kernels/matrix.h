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
Matrix RowsOf(const Matrix& m, int64_t first, int64_t count);
// `m` with `other` in every column outside the given groups of `group` columns.
Matrix OnlyGroups(const Matrix& m, const std::vector<int32_t>& groups, int64_t group, float other);
// The same bits, any NaN equal to any other.
bool SameBits(const Matrix& a, const Matrix& b);

// first, first + step, ... below last.
std::vector<int32_t> EveryOther(int32_t first, int32_t last, int32_t step);
// About a `share` of 0 ... all, ascending, the same for the same seed.
std::vector<int32_t> Sample(int32_t all, double share, uint32_t seed);
// What is in any of the lists, ascending.
std::vector<int32_t> UnionOf(const std::vector<std::vector<int32_t>>& lists);

float Float16Value(uint16_t bits);

// Memory that tensors of a test lie in, one exact heap block each so that AddressSanitizer sees any read past an end.
class Arena {
 public:
  // A packed tensor, or one whose rows lie `stride` elements apart.
  Tensor Make(DType dtype, int64_t rows, int64_t cols, int64_t stride = 0);
  // Rounds to `dtype`: float16 holds 65504 at most or infinity, int8 whole numbers.
  Tensor Put(const Matrix& m, DType dtype = DType::kFloat32, int64_t stride = 0);
  Tensor PutInts(const std::vector<int32_t>& values);
  // Of w [outputs, inputs]; int8 with factors. Rows lie `padding` elements further apart than they are long.
  LinearWeights Weights(const Matrix& w, LinearWeights::Layout layout, DType dtype, const Matrix& bias = {},
                        int64_t padding = 0);
  Selection Select(const std::vector<int32_t>& indices);
  // What each row selected out of `all`, and the union.
  Selection SelectRows(const std::vector<std::vector<int32_t>>& rows, int64_t all,
                       const std::vector<int32_t>& strict = {});

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
};

// What a tensor of any type holds.
Matrix Get(const Tensor& t);

// x W^T + b, W [outputs, inputs]; `magnitude` receives the sum of the terms' absolute values.
Matrix ReferenceLinear(const Matrix& x, const Matrix& w, const Matrix& bias, Matrix* magnitude);

}  // namespace dejavu

#endif  // TESTS_KERNELS_MATRIX_H_
