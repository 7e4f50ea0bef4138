#include "kernels/cuda/load_module.h"

#include "kernels/base/load_module.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cuda_backend.h"

namespace dejavu::cuda {

// A file that turns out not to be the module stays loaded: what its libraries have begun cannot be undone.
absl::StatusOr<const DejavuCudaModule*> LoadModule() {
  return LoadModuleAs<DejavuCudaModule>({.what = "CUDA",
                                         .variable = "DEJAVU_CUDA_MODULE",
                                         .file = "libdejavu_cuda.so",
                                         .entry = DEJAVU_CUDA_ENTRY,
                                         .version = DEJAVU_CUDA_ABI_VERSION});
}

}  // namespace dejavu::cuda

namespace dejavu {

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(int device) {
  ASSIGN_OR_RETURN(const DejavuCudaModule* const module, cuda::LoadModule());
  return MakeCudaBackend(module, device);
}

}  // namespace dejavu
