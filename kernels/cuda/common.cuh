// What several kernels use: places in the block, sums over a block in a fixed order, masks, loads.
#ifndef KERNELS_CUDA_COMMON_CUH_
#define KERNELS_CUDA_COMMON_CUH_

#include "kernels/cuda/device.h"
#include "kernels/cuda/params.h"

namespace dejavu::cuda {

constexpr uint32_t kAllLanes = 0xFFFFFFFF;

DJ_DEVICE int Thread() { return static_cast<int>(threadIdx.x); }
DJ_DEVICE int Warp() { return Thread() / 32; }
DJ_DEVICE int Lane() { return Thread() % 32; }

DJ_DEVICE int Min(int a, int b) { return a < b ? a : b; }
DJ_DEVICE int Max(int a, int b) { return a > b ? a : b; }
DJ_DEVICE int DivideUp(int a, int b) { return (a + b - 1) / b; }

template <typename T>
DJ_DEVICE T* Row(const MatrixOf<T>& m, int64_t row) {
  return m.data + row * m.stride;
}

DJ_DEVICE bool Bit(const int32_t* words, int i) { return (static_cast<uint32_t>(words[i / 32]) >> (i % 32) & 1) != 0; }

// Whether row `row` computes only what it selected itself.
DJ_DEVICE bool IsStrict(const SelectionParams& s, int row) {
  return s.masks.data != nullptr && (s.strict == nullptr || s.strict[row] != 0);
}

DJ_DEVICE uint32_t UnionWord(const MatrixOf<const int32_t>& masks, int rows, int word) {
  uint32_t any = 0;
  for (int r = 0; r < rows; ++r) any |= static_cast<uint32_t>(Row(masks, r)[word]);
  return any;
}

// The sum of all threads' values, in all of them. `shared` has kWarps places. The threads meet before it is used again.
template <typename T>
DJ_DEVICE T BlockSum(T value, T* shared) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  __syncthreads();
  if (Lane() == 0) shared[Warp()] = value;
  __syncthreads();
  T sum = shared[0];
  for (int w = 1; w < kWarps; ++w) sum += shared[w];
  return sum;
}

// True in all threads of the last block of `blocks` that comes here; it sees what the others wrote before. The ticket
// is back at zero then.
DJ_DEVICE bool IsLastBlock(uint32_t* ticket, uint32_t blocks) {
  DJ_SHARED(uint32_t, number, 1);
  __threadfence();
  __syncthreads();
  if (Thread() == 0) {
    number[0] = atomicAdd(ticket, 1u);
    if (number[0] == blocks - 1) *ticket = 0;
  }
  __syncthreads();
  const bool last = number[0] == blocks - 1;
  if (last) __threadfence();
  return last;
}

DJ_DEVICE float WidenElement(const float* p) { return *p; }
DJ_DEVICE float WidenElement(const int8_t* p) { return static_cast<float>(*p); }

// How float weights of 16 bits are read and written.
struct Half {
  uint16_t bits;
  static DJ_DEVICE float Widen(uint16_t bits) { return HalfToFloat(bits); }
  static DJ_DEVICE uint16_t Narrow(float value) { return FloatToHalf(value); }
};
struct BFloat16 {
  uint16_t bits;
  static DJ_DEVICE float Widen(uint16_t bits) { return BFloat16ToFloat(bits); }
  static DJ_DEVICE uint16_t Narrow(float value) { return FloatToBFloat16(value); }
};
DJ_DEVICE float WidenElement(const Half* p) { return HalfToFloat(p->bits); }
DJ_DEVICE float WidenElement(const BFloat16* p) { return BFloat16ToFloat(p->bits); }

// high + low = x, as far as the type goes: beyond it high is its largest number, and low the rest. A finite x that two
// numbers of float16 cannot hold becomes NaN, so that its row fails: an infinity could end at a ReLU.
DJ_DEVICE void Split(float x, uint16_t& high, uint16_t& low, Half) {
  constexpr uint16_t kInfinity = 0x7C00, kMost = 0x7BFF, kNaN = 0x7E00;
  high = FloatToHalf(x);
  low = 0;
  if ((high & 0x7FFF) == kInfinity && fabsf(x) <= 3.402823466e38f) {
    high = static_cast<uint16_t>((high & 0x8000) | kMost);
  }
  if ((high & 0x7FFF) < kInfinity) low = FloatToHalf(x - HalfToFloat(high));
  if ((low & 0x7FFF) == kInfinity) high = kNaN;
}
DJ_DEVICE void Split(float x, uint16_t& high, uint16_t& low, BFloat16) {
  constexpr uint16_t kInfinity = 0x7F80;
  high = FloatToBFloat16(x);
  low = (high & 0x7FFF) < kInfinity ? FloatToBFloat16(x - BFloat16ToFloat(high)) : uint16_t{0};
}

// The elements of 16 bytes, in order.
DJ_DEVICE void WidenPiece(const Vector16& v, float (&to)[4], const float*) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(v.w[i]);
}
template <typename W>
DJ_DEVICE void WidenPiece(const Vector16& v, float (&to)[8], const W*) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = W::Widen(static_cast<uint16_t>(v.w[i]));
    to[2 * i + 1] = W::Widen(static_cast<uint16_t>(v.w[i] >> 16));
  }
}
// 2^23 + 128 + an integer has the integer in its last bits: conversions would take four times as long as sums.
DJ_DEVICE void WidenPiece(const Vector16& v, float (&to)[16], const int8_t*) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = __byte_perm(v.w[i / 4] ^ 0x80808080u, 0x4B000000u, 0x7440u + i % 4);
    to[i] = __uint_as_float(bits) - 8388736.0f;
  }
}

// 16 bytes of elements of which the first n are there; the others become zero. For rows that do not allow LoadStream.
template <typename W>
DJ_DEVICE Vector16 LoadPart(const W* from, int n) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(W));
  Vector16 v = {{0, 0, 0, 0}};
#pragma unroll
  for (int i = 0; i < 4 * kPerWord; ++i) {
    if (i >= n) continue;
    uint32_t bits;
    if constexpr (sizeof(W) == 4) {
      bits = __float_as_uint(from[i]);
    } else if constexpr (sizeof(W) == 2) {
      bits = from[i].bits;
    } else {
      bits = static_cast<uint8_t>(from[i]);
    }
    v.w[i / kPerWord] |= bits << (i % kPerWord * (32 / kPerWord));
  }
  return v;
}

// from[0 ... 4), of which `left` are there; zeros beyond. `vectors`: 16 bytes can be read at once.
DJ_DEVICE void LoadFour(const float* from, int left, bool vectors, float (&to)[4]) {
  if (vectors && left >= 4) {
    WidenPiece(LoadVector(from), to, from);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = e < left ? from[e] : 0.0f;
  }
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_COMMON_CUH_
