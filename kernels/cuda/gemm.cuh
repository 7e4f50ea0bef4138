// What goes on around the products that a library does, of many rows: each element once, 16 bytes at a time.
#ifndef KERNELS_CUDA_GEMM_CUH_
#define KERNELS_CUDA_GEMM_CUH_

#include "kernels/cuda/fragments.cuh"

namespace dejavu::cuda {

// `bits`: which of the thread's features, from `first` on, are not zero in `row`. Their sum over the rows waits for the
// last block. Threads with features beyond the last have none of them.
DJ_DEVICE void CountActive(const SplitParams& p, int row, int first, uint32_t bits) {
  int count = __popc(bits);
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(kAllLanes, count, step);
  if (row < p.counted && Lane() == 0 && count > 0) atomicAdd(p.active + row, count);
  uint32_t word = bits << (first % 32);
  word |= __shfl_xor_sync(kAllLanes, word, 1);
  word |= __shfl_xor_sync(kAllLanes, word, 2);
  if (Lane() % 4 == 0 && word != 0) atomicOr(p.in_any + first / 32, word);

  if (!IsLastBlock(p.ticket, gridDim.x * gridDim.y)) return;
  DJ_SHARED(int, counts, kWarps);
  int any = 0;
  for (int i = Thread(); i < DivideUp(p.features, 32); i += kBlockThreads) {
    any += __popc(p.in_any[i]);
    p.in_any[i] = 0;
  }
  any = BlockSum(any, counts);
  if (Thread() == 0) p.active[p.counted] += any;
}
static_assert(kSplitPiece * 4 == 32, "four threads have a word");

template <typename W>
DJ_DEVICE void SplitRow(const SplitParams& p) {
  GridWait();
  GridLaunchDependents();
  const int row = static_cast<int>(blockIdx.y);
  const int first = (static_cast<int>(blockIdx.x) * kBlockThreads + Thread()) * kSplitPiece;
  if (row == 0 && blockIdx.x == 0) {
    for (int k = Thread(); k < p.cleared_count; k += kBlockThreads) p.cleared[k] = 0;
  }
  uint32_t bits = 0;
  if (first < p.features) {
    const float* from = Row(p.x, row) + first;
    float x[kSplitPiece];
#pragma unroll
    for (int i = 0; i < kSplitPiece; i += 4) {
      float four[4];
      LoadFour(from + i, p.features - first - i, p.vectors, four);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[i + e] = four[e];
        bits |= static_cast<uint32_t>(four[e] != 0.0f) << (i + e);
      }
    }
    Vector16 halves[2];
    HalfTerms<W>::Place(x, 1.0f, halves, 1);
    *reinterpret_cast<Vector16*>(Row(p.high, row) + first) = halves[0];
    *reinterpret_cast<Vector16*>(Row(p.low, row) + first) = halves[1];
  }
  if (p.active != nullptr) CountActive(p, row, first, bits);
}
DJ_KERNEL(SplitF16, SplitParams, kBlockThreads) { SplitRow<Half>(p); }
DJ_KERNEL(SplitBF16, SplitParams, kBlockThreads) { SplitRow<BFloat16>(p); }

DJ_DEVICE float Finished(float high, float low, float bias, bool relu) {
  const float sum = high + low + bias;
  return relu && sum < 0.0f ? 0.0f : sum;  // NaN stays
}

DJ_KERNEL(FinishGemm, FinishGemmParams, kBlockThreads) {
  GridWait();
  GridLaunchDependents();
  const int first = (static_cast<int>(blockIdx.x) * kBlockThreads + Thread()) * 4;
  const float* high = Row(p.high, blockIdx.y) + first;
  const float* low = Row(p.low, blockIdx.y) + first;
  float* y = Row(p.y, blockIdx.y) + first;
  if (p.vectors && first < p.features) {
    const Vector16 h = LoadVector(high), l = LoadVector(low);
    Vector16 v = {};
    if (p.bias != nullptr) v = LoadVector(p.bias + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v.w[i] = __float_as_uint(
          Finished(__uint_as_float(h.w[i]), __uint_as_float(l.w[i]), __uint_as_float(v.w[i]), p.relu != 0));
    }
    *reinterpret_cast<Vector16*>(y) = v;
    return;
  }
  for (int i = 0; i < 4 && first + i < p.features; ++i) {
    y[i] = Finished(high[i], low[i], p.bias != nullptr ? p.bias[first + i] : 0.0f, p.relu != 0);
  }
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_GEMM_CUH_
