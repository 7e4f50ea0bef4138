// The CUDA backend where none was built.
#include "kernels/backend.h"

namespace dejavu {

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(int device) {
  return absl::UnavailableError("backend cuda: this build of dejavud has no CUDA backend (device " +
                                std::to_string(device) + " was asked for); use backend: cpu or auto");
}

}  // namespace dejavu
