#include "engine/load/synthetic/noise.h"

#include <algorithm>
#include <cmath>

#include "engine/model/weight_convert.h"

namespace dejavu {

uint64_t Scramble(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

uint64_t NoiseKey(uint64_t seed, NoisePart part, int32_t layer) {
  return Scramble(Scramble(Scramble(seed) + static_cast<uint64_t>(part)) + static_cast<uint64_t>(layer));
}

float SumOfSquares(const float* values, int64_t count) {
  constexpr int64_t kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) sums[k] += values[i + k] * values[i + k];
  }
  float sum = 0.0f;
  for (; i < count; ++i) sum += values[i] * values[i];
  for (const float part : sums) sum += part;
  return sum;
}

NoisePool::NoisePool(uint64_t seed, int64_t longest_row) : values_(kSize + longest_row), squares_(values_.size() + 1) {
  const uint64_t key = NoiseKey(seed, NoisePart::kPool);
  const auto uniform = [=](int64_t i) { return (static_cast<double>(Scramble(key + i) >> 11) + 0.5) * 0x1p-53; };
  double sum = 0.0, square = 0.0;
  for (int64_t i = 0; i < kSize; i += 2) {  // Box and Muller
    const double radius = std::sqrt(-2.0 * std::log(uniform(i))), angle = 6.283185307179586 * uniform(i + 1);
    values_[i] = static_cast<float>(radius * std::cos(angle));
    values_[i + 1] = static_cast<float>(radius * std::sin(angle));
  }
  for (int64_t i = 0; i < kSize; ++i) sum += values_[i], square += static_cast<double>(values_[i]) * values_[i];
  const double mean = sum / kSize, deviation = std::sqrt(square / kSize - mean * mean);
  for (int64_t i = 0; i < kSize; ++i) values_[i] = static_cast<float>((values_[i] - mean) / deviation);
  std::copy_n(values_.begin(), longest_row, values_.begin() + kSize);
  for (size_t i = 0; i < values_.size(); ++i) {
    squares_[i + 1] = squares_[i] + static_cast<double>(values_[i]) * values_[i];
  }
  largest_ = LargestMagnitude(values_.data(), kSize);
}

int64_t NoisePool::Offset(uint64_t key, int64_t row) {
  uint64_t x = static_cast<uint64_t>(row);
  x = ((x + key) * 0x2545Fu) & (kSize - 1);
  x ^= x >> 9;
  x = ((x + (key >> 32)) * 0x1B873u) & (kSize - 1);
  x ^= x >> 9;
  return static_cast<int64_t>(x);
}

}  // namespace dejavu
