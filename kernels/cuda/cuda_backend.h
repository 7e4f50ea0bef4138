// The CUDA backend over a module (kernels/cuda/abi.h): which kernels an op takes, over which grids, what is fused, and
// the device's memory. Plain C++; the tests run it over an emulated module.
#ifndef KERNELS_CUDA_CUDA_BACKEND_H_
#define KERNELS_CUDA_CUDA_BACKEND_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/abi.h"

namespace dejavu {

// Over the module that this machine has (kernels/cuda/load_module.h). UNAVAILABLE with the reason where there is none,
// or no device.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(int device);

// `module` must outlive the backend and its buffers. UNAVAILABLE with the module's reason where the device cannot be
// opened. Once something has failed on the device, every op throws std::runtime_error that names the first failure: the
// context is lost.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const DejavuCudaModule* module, int device);

}  // namespace dejavu

#endif  // KERNELS_CUDA_CUDA_BACKEND_H_
