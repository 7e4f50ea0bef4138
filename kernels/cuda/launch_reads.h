// What a launch must read of the device's memory, from its parameters (kernels/cuda/params.h): the least that any
// kernel for them could read, each byte once. For those who measure; any thread.
#ifndef KERNELS_CUDA_LAUNCH_READS_H_
#define KERNELS_CUDA_LAUNCH_READS_H_

#include <cstdint>

#include "kernels/cuda/abi.h"
#include "kernels/cuda/params.h"

namespace dejavu::cuda {

struct LaunchReads {
  const void* weight = nullptr;  // the first that it reads, which tells what the launch is for
  int64_t rows = 0;              // of activations
  // Bytes.
  int64_t weights = 0;  // with biases, norms, factors of int8 and what a predictor has
  int64_t listed = 0;   // of those, what was chosen: by a list, or because an activation is not zero
  int64_t keys_values = 0;
  int64_t activations = 0;

  int64_t bytes() const { return weights + keys_values + activations; }
};

// What the parameters only point to. `weight` is that of the rows in question.
class LaunchState {
 public:
  virtual ~LaunchState() = default;
  virtual int32_t Selected(const void* weight, const int32_t* count) = 0;  // entries of a list
  virtual int32_t Active(const void* weight, const int32_t* count) = 0;    // inputs that are not zero in some row
  virtual int32_t Position(const int32_t* position) = 0;                   // of a row
  virtual int32_t LargestRank(const SelectParams& select) = 0;             // of what the rows ask for; 0: nothing
};

LaunchReads ReadsOf(const DejavuCudaLaunch& launch, LaunchState& state);
LaunchReads ReadsOf(const DejavuCudaGemm& gemm);

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_LAUNCH_READS_H_
