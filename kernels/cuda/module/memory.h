// The device's memory, the host's that is pinned, and copies between them.
#ifndef KERNELS_CUDA_MODULE_MEMORY_H_
#define KERNELS_CUDA_MODULE_MEMORY_H_

#include <cstdint>

#include "kernels/cuda/module/context.h"

namespace dejavu::cuda {

// Of the table (kernels/cuda/abi.h).
int Allocate(DejavuCudaContext* context, int64_t bytes, void** memory);
int Free(DejavuCudaContext* context, void* memory);
int AllocatePinned(DejavuCudaContext* context, int64_t bytes, void** memory);
int FreePinned(DejavuCudaContext* context, void* memory);
int Upload(DejavuCudaContext* context, DejavuCudaUpload upload);
int Fetch(DejavuCudaContext* context, DejavuCudaFetch fetch);
int Download(DejavuCudaContext* context, DejavuCudaDownload download);
int Synchronize(DejavuCudaContext* context);

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_MODULE_MEMORY_H_
