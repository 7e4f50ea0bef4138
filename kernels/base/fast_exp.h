// e^x to about 1e-6, |x| <= 80, in a form that compilers turn into vectors. Any thread.
#ifndef KERNELS_BASE_FAST_EXP_H_
#define KERNELS_BASE_FAST_EXP_H_

#include <bit>
#include <cstdint>

namespace dejavu {

inline float FastExp(float x) {
  const float t = x * 1.44269504f;
  const float shifted = t + 12582912.0f;  // rounds to an integer in the low bits
  const float f = (t - (shifted - 12582912.0f)) * 0.69314718f;
  const float p = 1.0f + f * (1.0f + f * (0.5f + f * (0.16666667f + f * (0.041666668f + f * 0.0083333f))));
  return p * std::bit_cast<float>((std::bit_cast<int32_t>(shifted) - 0x4B400000 + 127) << 23);
}

}  // namespace dejavu

#endif  // KERNELS_BASE_FAST_EXP_H_
