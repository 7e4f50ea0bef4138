// What the memory gives at best: reads it and adds it up, so that nothing of it can be left out. Of no model; for
// dejavu-bench, which takes the fastest of several ways.
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

// With kGroups groups of copies under way in a ring. A thread reads from the ring what it has copied there itself, so
// that threads never meet. The ring is filled before GridWait, as with weights.
template <int kGroups>
DJ_DEVICE void SumByRing(const ReadSumParams& p, Vector16* ring) {
  constexpr int kCopies = kReadGroupBytes / (kBlockThreads * static_cast<int>(sizeof(Vector16)));
  constexpr int64_t kPiece = kCopies * kBlockThreads;  // a group's
  const Vector16* data = static_cast<const Vector16*>(p.data);
  int64_t next = blockIdx.x * kPiece;
  const auto ask = [&](int group) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t at = next + i * kBlockThreads + Thread();
      CopyAsync16(ring + (group * kCopies + i) * kBlockThreads + Thread(), data + (at < p.vectors ? at : 0),
                  at < p.vectors);
    }
    CopyAsyncCommit();
    next += gridDim.x * kPiece;
  };
  for (int group = 0; group < kGroups; ++group) ask(group);
  GridWait();
  GridLaunchDependents();
  uint64_t sum = 0;
  int group = 0;
  for (int64_t first = blockIdx.x * kPiece; first < p.vectors; first += gridDim.x * kPiece) {
    CopyAsyncWait<kGroups - 1>();
#pragma unroll
    for (int i = 0; i < kCopies; ++i) sum += SumOfWords(ring[(group * kCopies + i) * kBlockThreads + Thread()]);
    ask(group);  // zeros where nothing is left
    group = group + 1 == kGroups ? 0 : group + 1;
  }
  CopyAsyncWait<0>();
  p.sums[int64_t{blockIdx.x} * kBlockThreads + Thread()] += sum;
}

DJ_WIDE_KERNEL(ReadSumRing, ReadSumParams, kBlockThreads) {
  DJ_DYNAMIC_SHARED(Vector16, ring);
  if (p.ring_groups == 6) {
    SumByRing<6>(p, ring);
  } else if (p.ring_groups == 8) {
    SumByRing<8>(p, ring);
  } else {
    SumByRing<12>(p, ring);
  }
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_PROBE_CUH_
