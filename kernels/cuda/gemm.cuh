// What goes on around the products that a library does, of many rows: each element once.
#ifndef KERNELS_CUDA_GEMM_CUH_
#define KERNELS_CUDA_GEMM_CUH_

#include "kernels/cuda/common.cuh"

namespace dejavu::cuda {

// Grid (pieces, rows), as of the next.
template <typename W>
DJ_DEVICE void SplitRow(const SplitParams& p) {
  GridWait();
  GridLaunchDependents();
  const int row = static_cast<int>(blockIdx.y), i = static_cast<int>(blockIdx.x) * kBlockThreads + Thread();
  if (row == 0 && blockIdx.x == 0) {
    for (int k = Thread(); k < p.cleared_count; k += kBlockThreads) p.cleared[k] = 0;
  }
  if (i < p.features) Split(Row(p.x, row)[i], Row(p.high, row)[i], Row(p.low, row)[i], W());
}
DJ_KERNEL(SplitF16, SplitParams, kBlockThreads) { SplitRow<Half>(p); }
DJ_KERNEL(SplitBF16, SplitParams, kBlockThreads) { SplitRow<BFloat16>(p); }

DJ_KERNEL(FinishGemm, FinishGemmParams, kBlockThreads) {
  GridWait();
  GridLaunchDependents();
  const int i = static_cast<int>(blockIdx.x) * kBlockThreads + Thread();
  if (i >= p.features) return;
  float& y = Row(p.y, blockIdx.y)[i];
  const float sum = p.bias != nullptr ? y + p.bias[i] : y;
  y = p.relu && sum < 0.0f ? 0.0f : sum;  // NaN stays
}

// A thread has a neuron.
DJ_KERNEL(CountActive, CountActiveParams, kBlockThreads) {
  GridWait();
  GridLaunchDependents();
  const int neuron = static_cast<int>(blockIdx.x) * kBlockThreads + Thread();
  bool any = false;
  for (int r = 0; r < p.rows; ++r) {
    const bool active = neuron < p.neurons && Row(p.x, r)[neuron] != 0.0f;
    any = any || active;
    if (r >= p.counted) continue;
    const int count = __popc(__ballot_sync(kAllLanes, active));
    if (Lane() == 0 && count > 0) atomicAdd(p.active + r, count);
  }
  const int count = __popc(__ballot_sync(kAllLanes, any));
  if (Lane() == 0 && count > 0) atomicAdd(p.active + p.counted, count);
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_GEMM_CUH_
