// How much of the memory a kernel has asked for at a time, by asynchronous copies into a ring in shared memory: what
// covers the memory's latency (docs/design/kernels-cuda.md). ./run gpu-kernels lists it and holds it against the copies
// in the machine code. A kernel that is not here has no ring.
#ifndef KERNELS_CUDA_RINGS_H_
#define KERNELS_CUDA_RINGS_H_

#include <cstdint>

#include "kernels/cuda/params.h"

namespace dejavu::cuda {

struct Ring {
  int32_t before_wait_bytes;  // of a block, that it asks for before GridWait: weights, old keys and values
  int32_t after_wait_bytes;   // and from then on, as long as something is left
  int32_t blocks;             // of a multiprocessor at once
};

constexpr Ring RingOf(Kernel kernel) {
  switch (kernel) {
    case kLinearF16x8:
    case kLinearF16x16:
    case kLinearBF16x8:
    case kLinearBF16x16:
    case kLinearI8x8:
    case kLinearI8x16:
      return {kLinearRingBytes, kLinearRingBytes, 1};
    case kSumF32x1:
    case kSumF32x4:
    case kSumF32x8:
    case kSumF16x1:
    case kSumF16x4:
    case kSumF16x8:
    case kSumBF16x1:
    case kSumBF16x4:
    case kSumBF16x8:
    case kSumI8x1:
    case kSumI8x4:
      return {SumRingBytes(false), SumRingBytes(false), 2};
    case kSumF16x16:
    case kSumBF16x16:
    case kSumI8x8:
      return {SumRingBytes(true), SumRingBytes(true), 1};
    case kAttentionF16:
    case kAttentionF32: {
      constexpr int32_t kSlots = kWarps * kDecodeSlots * kMostDecodeSlotBytes;
      return {kSlots, kSlots, 3};
    }
    case kReadSumRing:
      return {12 * kReadGroupBytes, 12 * kReadGroupBytes, 1};
    default:
      return {0, 0, 0};
  }
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_RINGS_H_
