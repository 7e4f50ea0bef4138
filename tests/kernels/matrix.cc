#include "tests/kernels/matrix.h"

#include <hwy/base.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <set>

namespace dejavu {
namespace {

// Rounds towards zero.
uint16_t Float16Bits(float value) {
  const float magnitude = std::abs(value);
  if (std::isnan(value)) return 0x7E00;
  if (std::isinf(value)) return static_cast<uint16_t>((std::signbit(value) << 15) | 0x7C00);
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

Matrix RowsOf(const Matrix& m, int64_t first, int64_t count) {
  Matrix part(count, m.cols);
  std::copy_n(m.values.begin() + first * m.cols, count * m.cols, part.values.begin());
  return part;
}

Matrix OnlyGroups(const Matrix& m, const std::vector<int32_t>& groups, int64_t group, float other) {
  Matrix result(m.rows, m.cols, other);
  for (int64_t r = 0; r < m.rows; ++r) {
    for (const int32_t g : groups) std::copy_n(&m.values[r * m.cols + g * group], group, &result.at(r, g * group));
  }
  return result;
}

bool SameBits(const Matrix& a, const Matrix& b) {
  if (a.rows != b.rows || a.cols != b.cols) return false;
  for (size_t i = 0; i < a.values.size(); ++i) {
    if (std::isnan(a.values[i]) && std::isnan(b.values[i])) continue;
    if (std::bit_cast<uint32_t>(a.values[i]) != std::bit_cast<uint32_t>(b.values[i])) return false;
  }
  return true;
}

std::vector<int32_t> EveryOther(int32_t first, int32_t last, int32_t step) {
  std::vector<int32_t> result;
  for (int32_t i = first; i < last; i += step) result.push_back(i);
  return result;
}

std::vector<int32_t> Sample(int32_t all, double share, uint32_t seed) {
  std::mt19937 generator(seed);
  std::bernoulli_distribution chosen(share);
  std::vector<int32_t> result;
  for (int32_t i = 0; i < all; ++i) {
    if (chosen(generator)) result.push_back(i);
  }
  return result;
}

std::vector<int32_t> UnionOf(const std::vector<std::vector<int32_t>>& lists) {
  std::set<int32_t> all;
  for (const auto& list : lists) all.insert(list.begin(), list.end());
  return {all.begin(), all.end()};
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
      } else if (dtype == DType::kInt8) {
        t.row<int8_t>(r)[c] = static_cast<int8_t>(value);
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

LinearWeights Arena::Weights(const Matrix& w, LinearWeights::Layout layout, DType dtype, const Matrix& bias,
                             int64_t padding) {
  LinearWeights result;
  result.layout = layout;
  Matrix values = layout == LinearWeights::Layout::kOutputRows ? w : Transposed(w);
  if (dtype == DType::kInt8) {
    for (float& value : values.values) value = std::round(127.0f * value);
    Matrix scale = Random(1, values.rows, 4);
    for (float& value : scale.values) value /= 127.0f;
    result.scale = Put(scale);
  }
  result.weight = Put(values, dtype, values.cols + padding);
  if (!bias.values.empty()) result.bias = Put(bias);
  return result;
}

Selection Arena::Select(const std::vector<int32_t>& indices) {
  return {PutInts(indices), PutInts({static_cast<int32_t>(indices.size())})};
}

Selection Arena::SelectRows(const std::vector<std::vector<int32_t>>& rows, int64_t all,
                            const std::vector<int32_t>& strict) {
  Selection selection = Select(UnionOf(rows));
  selection.masks = Make(DType::kInt32, static_cast<int64_t>(rows.size()), (all + 31) / 32);
  for (size_t r = 0; r < rows.size(); ++r) {
    auto* words = selection.masks.row<uint32_t>(static_cast<int64_t>(r));
    for (const int32_t i : rows[r]) words[i / 32] |= 1u << (i % 32);
  }
  if (!strict.empty()) selection.strict = PutInts(strict);
  return selection;
}

Matrix Get(const Tensor& t) {
  Matrix m(t.rows, t.cols);
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t c = 0; c < t.cols; ++c) {
      if (t.dtype == DType::kFloat32) {
        m.at(r, c) = t.row<float>(r)[c];
      } else if (t.dtype == DType::kInt8) {
        m.at(r, c) = t.row<int8_t>(r)[c];
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
