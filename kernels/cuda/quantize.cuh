// Activations for int8 weights, rounded as on the CPU (kernels/cpu/kernels.h): x = scale * q, |q| < 2^14, scale a power
// of two; 0 where all of x is below 2^-100, NaN where some of it is not finite.
#ifndef KERNELS_CUDA_QUANTIZE_CUH_
#define KERNELS_CUDA_QUANTIZE_CUH_

#include "kernels/cuda/common.cuh"

namespace dejavu::cuda {

constexpr int kQuantizedBits = 14;
constexpr int kQuantizedMost = (1 << kQuantizedBits) - 1;
constexpr int kExponentBias = 127;

// Floats without their signs order as integers.
DJ_DEVICE int Magnitude(float x) { return static_cast<int>(__float_as_uint(x) & 0x7FFFFFFFu); }

// The scale of x whose largest Magnitude is `most`.
DJ_DEVICE float QuantizedScaleOf(int most) {
  constexpr int kInfinity = 0x7F800000, kLeast = (kExponentBias - 100) << 23;
  if (most >= kInfinity) return __uint_as_float(0x7FC00000u);
  if (most < kLeast) return 0.0f;
  const int exponent = (most >> 23) + 1 - kQuantizedBits;  // of twice the power of two that is not above it
  return __uint_as_float(static_cast<uint32_t>(exponent) << 23);
}

// That of x[0 ... n), found by a whole warp.
DJ_DEVICE float QuantizedScale(const float* x, int n) {
  int most = 0;
  for (int i = Lane(); i < n; i += 32) most = Max(most, Magnitude(x[i]));
  for (int step = 16; step > 0; step /= 2) most = Max(most, __shfl_xor_sync(kAllLanes, most, step));
  return QuantizedScaleOf(most);
}

// 0 for scales that leave no integer but 0.
DJ_DEVICE float QuantizedInverse(float scale) {
  if (!(scale > 0.0f)) return 0.0f;
  return __uint_as_float(static_cast<uint32_t>(2 * kExponentBias << 23) - __float_as_uint(scale));
}

DJ_DEVICE int Quantize(float x, float inverse) {
  if (inverse == 0.0f) return 0;
  return Max(-kQuantizedMost, Min(static_cast<int>(rintf(x * inverse)), kQuantizedMost));
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_QUANTIZE_CUH_
