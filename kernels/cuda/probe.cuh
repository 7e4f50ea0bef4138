// What the memory gives at best: reads it and adds it up, so that nothing of it can be left out. Of no model; for
// dejavu-bench.
#ifndef KERNELS_CUDA_PROBE_CUH_
#define KERNELS_CUDA_PROBE_CUH_

#include "kernels/cuda/common.cuh"

namespace dejavu::cuda {

DJ_DEVICE uint64_t SumOfWords(const Vector16& v) {
  return (uint64_t{v.w[1]} << 32 | v.w[0]) + (uint64_t{v.w[3]} << 32 | v.w[2]);
}

// Blocks take pieces in turn; a thread has kLoads loads of a piece in flight.
DJ_KERNEL(ReadSum, ReadSumParams, kBlockThreads) {
  constexpr int kLoads = 8;
  constexpr int64_t kPiece = kLoads * kBlockThreads;
  GridWait();
  GridLaunchDependents();
  const Vector16* data = static_cast<const Vector16*>(p.data);
  uint64_t sum = 0;
  for (int64_t first = blockIdx.x * kPiece; first < p.vectors; first += gridDim.x * kPiece) {
    const int64_t mine = first + Thread();
    if (first + kPiece <= p.vectors) {
      Vector16 v[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) v[i] = LoadStream(data + mine + i * kBlockThreads);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) sum += SumOfWords(v[i]);
    } else {
      for (int64_t at = mine; at < p.vectors; at += kBlockThreads) sum += SumOfWords(LoadStream(data + at));
    }
  }
  p.sums[int64_t{blockIdx.x} * kBlockThreads + Thread()] += sum;
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_PROBE_CUH_
