#include "tests/kernels/matrix.h"

#include <hwy/base.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

namespace dejavu {
namespace {

// Rounds towards zero.
uint16_t Float16Bits(float value) {
  const float magnitude = std::abs(value);
  const int exponent = magnitude < 0x1p-14f ? -15 : std::ilogb(magnitude);
  const int mantissa = static_cast<int>(std::ldexp(magnitude, exponent == -15 ? 24 : 10 - exponent)) & 1023;
  return static_cast<uint16_t>((std::signbit(value) << 15) | ((exponent + 15) << 10) | mantissa);
}

}  // namespace

Matrix Random(int64_t rows, int64_t cols, uint32_t seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  Matrix m(rows, cols);
  for (float& value : m.values) value = uniform(generator);
  return m;
}

Matrix Transposed(const Matrix& m) {
  Matrix t(m.cols, m.rows);
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t c = 0; c < m.cols; ++c) t.at(c, r) = m.at(r, c);
  }
  return t;
}

float Float16Value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  float value;
  if (exponent == 31) {
    value = mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    value = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  }
  return bits >> 15 ? -value : value;
}

Tensor Arena::Make(DType dtype, int64_t rows, int64_t cols, int64_t stride) {
  if (stride == 0) stride = cols;
  const int64_t elements = rows == 0 ? 0 : (rows - 1) * stride + cols;
  blocks_.push_back(std::make_unique<char[]>(elements * SizeOf(dtype)));
  return Tensor{blocks_.back().get(), dtype, rows, cols, stride};
}

Tensor Arena::Put(const Matrix& m, DType dtype, int64_t stride) {
  Tensor t = Make(dtype, m.rows, m.cols, stride);
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t c = 0; c < m.cols; ++c) {
      const float value = m.at(r, c);
      if (dtype == DType::kFloat32) {
        t.row<float>(r)[c] = value;
      } else if (dtype == DType::kFloat16) {
        t.row<uint16_t>(r)[c] = Float16Bits(value);
      } else {
        t.row<hwy::bfloat16_t>(r)[c] = hwy::BF16FromF32(value);
      }
    }
  }
  return t;
}

Tensor Arena::PutInts(const std::vector<int32_t>& values) {
  Tensor t = Make(DType::kInt32, 1, static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), t.row<int32_t>(0));
  return t;
}

Selection Arena::Select(const std::vector<int32_t>& indices) {
  return {PutInts(indices), PutInts({static_cast<int32_t>(indices.size())})};
}

Matrix Get(const Tensor& t) {
  Matrix m(t.rows, t.cols);
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t c = 0; c < t.cols; ++c) {
      if (t.dtype == DType::kFloat32) {
        m.at(r, c) = t.row<float>(r)[c];
      } else {
        const uint16_t bits = t.row<uint16_t>(r)[c];
        const uint32_t high = uint32_t{bits} << 16;
        float value;
        std::memcpy(&value, &high, sizeof(value));
        m.at(r, c) = t.dtype == DType::kFloat16 ? Float16Value(bits) : value;
      }
    }
  }
  return m;
}

Matrix ReferenceLinear(const Matrix& x, const Matrix& w, const Matrix& bias, Matrix* magnitude) {
  Matrix y(x.rows, w.rows);
  *magnitude = Matrix(x.rows, w.rows);
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t o = 0; o < w.rows; ++o) {
      double sum = 0;
      double size = 0;
      for (int64_t i = 0; i < w.cols; ++i) {
        const double term = static_cast<double>(x.at(r, i)) * w.at(o, i);
        sum += term;
        size += std::abs(term);
      }
      if (!bias.values.empty()) sum += bias.at(0, o);
      y.at(r, o) = static_cast<float>(sum);
      magnitude->at(r, o) = static_cast<float>(size) + 1.0f;
    }
  }
  return y;
}

}  // namespace dejavu
