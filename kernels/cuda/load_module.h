// Finds the CUDA module and loads it, once and for the life of the process.
#ifndef KERNELS_CUDA_LOAD_MODULE_H_
#define KERNELS_CUDA_LOAD_MODULE_H_

#include "absl/status/statusor.h"
#include "kernels/cuda/abi.h"

namespace dejavu::cuda {

// From the file that the environment variable DEJAVU_CUDA_MODULE names; without it libdejavu_cuda.so beside the
// executable or in ../lib/dejavu from there. UNAVAILABLE, with why each of them was not it. Any thread.
absl::StatusOr<const DejavuCudaModule*> LoadModule();

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_LOAD_MODULE_H_
