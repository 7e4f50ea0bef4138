// Kernels that pass over rows of float32: memory of a few rows, next to nothing beside the weights. Sums have a fixed
// order: a thread's own elements first to last, then the lanes, then the warps.
#ifndef KERNELS_CUDA_ELEMENTWISE_CUH_
#define KERNELS_CUDA_ELEMENTWISE_CUH_

#include "kernels/cuda/common.cuh"
#include "kernels/draw.h"

namespace dejavu::cuda {

template <typename W>
DJ_DEVICE void EmbedRow(const EmbedParams& p, int row) {
  const int32_t given = p.ids[row];
  const int64_t id = (given < 0 && p.drawn != nullptr ? p.drawn[DrawnId(given)] : given) + p.offset;
  const bool known = id >= 0 && id < p.entries;
  const W* from = static_cast<const W*>(p.table) + (known ? id : 0) * p.stride;
  const float scale = known && p.scale != nullptr ? p.scale[id] : 1.0f;
  float* to = Row(p.y, row);
  for (int i = static_cast<int>(blockIdx.x) * kBlockThreads + Thread(); i < p.features;
       i += static_cast<int>(gridDim.x) * kBlockThreads) {
    const float value = known ? WidenElement(from + i) * scale : 0.0f;
    to[i] = p.accumulate ? to[i] + value : value;
  }
}

// Grid (pieces, rows), as of the next two.
DJ_KERNEL(Embed, EmbedParams, kBlockThreads) {
  GridWait();
  GridLaunchDependents();
  const int row = static_cast<int>(blockIdx.y);
  switch (p.type) {
    case kF32:
      return EmbedRow<float>(p, row);
    case kF16:
      return EmbedRow<Half>(p, row);
    case kBF16:
      return EmbedRow<BFloat16>(p, row);
    case kI8:
      return EmbedRow<int8_t>(p, row);
  }
}

DJ_KERNEL(Add, AddParams, kBlockThreads) {
  GridWait();
  GridLaunchDependents();
  float* to = Row(p.x, blockIdx.y);
  const float* from = Row(p.y, blockIdx.y);
  for (int i = static_cast<int>(blockIdx.x) * kBlockThreads + Thread(); i < p.features;
       i += static_cast<int>(gridDim.x) * kBlockThreads) {
    to[i] += from[i];
  }
}

DJ_KERNEL(GatherRows, GatherRowsParams, kBlockThreads) {
  GridWait();
  GridLaunchDependents();
  float* to = Row(p.y, blockIdx.y);
  const float* from = Row(p.x, p.ids[blockIdx.y]);
  for (int i = static_cast<int>(blockIdx.x) * kBlockThreads + Thread(); i < p.features;
       i += static_cast<int>(gridDim.x) * kBlockThreads) {
    to[i] = from[i];
  }
}

// A block does a row.
DJ_KERNEL(Audit, AuditParams, kBlockThreads) {
  DJ_SHARED(int, counts, kWarps);
  DJ_SHARED(float, masses, kWarps);
  GridWait();
  GridLaunchDependents();
  const float* h = Row(p.hidden, blockIdx.x);
  const int32_t* mask = p.masks.data != nullptr ? Row(p.masks, blockIdx.x) : nullptr;
  int selected = 0, active = 0, hits = 0;
  float mass = 0.0f, missed = 0.0f;
  for (int i = Thread(); i < p.neurons; i += kBlockThreads) {
    const bool chosen = mask == nullptr || Bit(mask, i);
    const bool not_zero = h[i] != 0.0f;
    selected += chosen;
    active += not_zero;
    hits += not_zero && chosen;
    if (!not_zero) continue;
    const float m = h[i] * h[i] * p.worth[i];
    mass += m;
    if (!chosen) missed += m;
  }
  selected = BlockSum(selected, counts);
  active = BlockSum(active, counts);
  hits = BlockSum(hits, counts);
  mass = BlockSum(mass, masses);
  missed = BlockSum(missed, masses);
  if (Thread() != 0) return;
  float* result = Row(p.result, blockIdx.x);
  result[0] = static_cast<float>(selected);  // in the order of AuditField (kernels/backend.h)
  result[1] = static_cast<float>(active);
  result[2] = static_cast<float>(hits);
  result[3] = mass;
  result[4] = missed;
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_ELEMENTWISE_CUH_
