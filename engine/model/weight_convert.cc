// Plain loops without branches or calls, so that the compiler turns them into vectors.
#include "engine/model/weight_convert.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/base/check.h"
#include "kernels/base/float16.h"

namespace dejavu {
namespace {

// Finite float16 bits. The exponents of the types lie 112 apart; the product is exact for subnormals too.
float FromFiniteFloat16(uint16_t bits) {
  const float magnitude = std::bit_cast<float>(uint32_t{bits & 0x7FFFu} << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | uint32_t{bits & 0x8000u} << 16);
}

// A finite float to bfloat16: to the nearest, ties to even.
uint16_t ToBFloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// |value| <= 127. Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
int8_t RoundToInt8(float value) {
  return static_cast<int8_t>(std::bit_cast<int32_t>(value + 12582912.0f) - 0x4B400000);
}

bool AnyInfinite(const uint16_t* values, int64_t count, uint16_t exponent_mask) {
  uint16_t any = 0;
  for (int64_t i = 0; i < count; ++i) any |= static_cast<uint16_t>((values[i] & exponent_mask) == exponent_mask);
  return any != 0;
}

// In square tiles. A tile reads its rows one after the other: their distance
// is often a power of two, so that down a column every element would fall into the same set of the cache.
template <typename T>
void Transpose(const T* source, int64_t rows, int64_t cols, T* target) {
  constexpr int64_t kTile = 32;
  for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
    for (int64_t c0 = 0; c0 < cols; c0 += kTile) {
      for (int64_t r = r0; r < std::min(r0 + kTile, rows); ++r) {
        for (int64_t c = c0; c < std::min(c0 + kTile, cols); ++c) target[c * rows + r] = source[r * cols + c];
      }
    }
  }
}

}  // namespace

void WidenValues(const void* source, DType dtype, int64_t count, float* target) {
  const auto* bits = static_cast<const uint16_t*>(source);
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(target, source, count * sizeof(float));
      return;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i) target[i] = FromFiniteFloat16(bits[i]);
      return;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) target[i] = FloatFromBFloat16(bits[i]);
      return;
    default:
      CHECK(false) << Name(dtype);
  }
}

bool NarrowValues(const float* source, int64_t count, DType dtype, void* target) {
  auto* bits = static_cast<uint16_t*>(target);
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(target, source, count * sizeof(float));
      return true;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i) bits[i] = Float16FromFloat(source[i]);
      return !AnyInfinite(bits, count, kFloat16Infinity);
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) bits[i] = ToBFloat16(source[i]);
      return !AnyInfinite(bits, count, 0x7F80);
    default:
      CHECK(false) << Name(dtype);
  }
  return false;
}

void QuantiseRow(const float* source, int64_t count, float inverse, int8_t* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = RoundToInt8(source[i] * inverse);
}

void QuantiseColumns(const float* source, int64_t count, const float* inverses, int8_t* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = RoundToInt8(source[i] * inverses[i]);
}

void TransposeValues(const void* source, int64_t element_bytes, int64_t rows, int64_t cols, void* target) {
  const auto as = [&](auto element) {
    using T = decltype(element);
    Transpose(static_cast<const T*>(source), rows, cols, static_cast<T*>(target));
  };
  if (element_bytes == 4) return as(uint32_t{});
  if (element_bytes == 2) return as(uint16_t{});
  CHECK(element_bytes == 1) << element_bytes;
  as(uint8_t{});
}

float LargestMagnitude(const float* values, int64_t count) {
  // Magnitudes compare like their bits.
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::bit_cast<uint32_t>(values[i]) & 0x7FFFFFFFu);
  }
  return std::bit_cast<float>(largest);
}

}  // namespace dejavu
