// Softmax, for comparing distributions of next tokens. Any thread.
#ifndef ENGINE_CALIBRATION_SOFTMAX_H_
#define ENGINE_CALIBRATION_SOFTMAX_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/base/fast_exp.h"

namespace dejavu {

// probabilities = softmax(logits) of one row; returns the log of the sum that it divides by, from zero.
inline double Softmax(const float* logits, int64_t count, float* probabilities) {
  const float largest = *std::max_element(logits, logits + count);
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    probabilities[i] = FastExp(std::max(-80.0f, logits[i] - largest));
    sum += probabilities[i];
  }
  const auto share = static_cast<float>(1.0 / sum);
  for (int64_t i = 0; i < count; ++i) probabilities[i] *= share;
  return largest + std::log(sum);
}

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_SOFTMAX_H_
