// Device memory that the launches of an op leave to each other. It grows to the largest size seen and then stays.
#ifndef KERNELS_CUDA_SCRATCH_H_
#define KERNELS_CUDA_SCRATCH_H_

#include <cstdint>

#include "kernels/cuda/device_queue.h"
#include "kernels/cuda/recordings.h"
#include "kernels/cuda/staging.h"
#include "kernels/tensor.h"

namespace dejavu::cuda {

class Scratch {
 public:
  Scratch(DeviceQueue& queue, Staging& staging, Recordings& recordings)
      : queue_(queue), staging_(staging), recordings_(recordings) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // [count] partial sums of a launch.
  template <typename T>
  T* Partial(int64_t count) {
    return Grown<T>(partial_, count);
  }
  // [count] that are zero between launches.
  uint32_t* Tickets(int64_t count) { return Grown<uint32_t>(tickets_, count); }
  // [count] for x of a product that the library does, in the type of the weights.
  uint16_t* Halves(int64_t count) { return Grown<uint16_t>(halves_, count); }
  // [bytes] for rows as products read them.
  char* HalfFragments(int64_t bytes) { return Grown<char>(half_fragments_, bytes); }
  char* IntegerFragments(int64_t bytes) { return Grown<char>(integer_fragments_, bytes); }

 private:
  template <typename T>
  T* Grown(Buffer& buffer, int64_t count) {
    Grow(buffer, count * int64_t{sizeof(T)});
    return static_cast<T*>(buffer.data());
  }
  void Grow(Buffer& buffer, int64_t bytes);

  DeviceQueue& queue_;
  Staging& staging_;
  Recordings& recordings_;
  Buffer partial_, tickets_, halves_, half_fragments_, integer_fragments_;
};

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_SCRATCH_H_
