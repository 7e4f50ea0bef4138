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
    case kReadSumRing:
      return {12 * kReadGroupBytes, 12 * kReadGroupBytes, 1};
    default:
      return {0, 0, 0};
  }
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_RINGS_H_
