#include "kernels/cuda/module/memory.h"

#include <cuda_runtime.h>

#include "kernels/cuda/module/group.h"

namespace dejavu::cuda {
namespace {

bool IsPinned(const DejavuCudaContext& context, const void* memory) {
  const char* const at = static_cast<const char*>(memory);
  const auto block = context.pinned.lower_bound(at);  // descending: the last one that begins at or before `at`
  return block != context.pinned.end() && at < block->first + block->second;
}

int Copy(DejavuCudaContext& context, const DejavuCudaCopy& copy, cudaMemcpyKind kind, const char* tried) {
  RETURN_IF_FAILED(Enter(context, tried));
  const bool pinned = IsPinned(context, kind == cudaMemcpyHostToDevice ? copy.from : copy.to);
  if (context.capturing && !pinned) {
    return Fail(cudaErrorStreamCaptureUnsupported, "%s: pageable memory cannot be part of a graph", tried);
  }
  if (copy.row_bytes == 0 || copy.rows == 0) return 0;
  const bool packed = copy.rows == 1 || (copy.to_stride == copy.row_bytes && copy.from_stride == copy.row_bytes);
  RETURN_IF_FAILED(Check(context,
                         packed ? cudaMemcpyAsync(copy.to, copy.from, copy.row_bytes * copy.rows, kind, context.stream)
                                : cudaMemcpy2DAsync(copy.to, copy.to_stride, copy.from, copy.from_stride,
                                                    copy.row_bytes, copy.rows, kind, context.stream),
                         tried));
  // Whether CUDA has read pageable memory when the copy returns depends on the machine.
  if (!pinned) RETURN_IF_FAILED(AwaitStream(context, tried));
  return 0;
}

}  // namespace

int Allocate(DejavuCudaContext* context, int64_t bytes, void** memory) {
  RETURN_IF_FAILED(Enter(*context, "allocate"));
  const cudaError_t error = cudaMalloc(memory, bytes);
  if (error == cudaErrorMemoryAllocation) {
    size_t available = 0, total = 0;
    cudaGetLastError();
    cudaMemGetInfo(&available, &total);
    return Fail(error, "allocate %lld bytes: %s: the device has %zu bytes free of %zu", static_cast<long long>(bytes),
                cudaGetErrorName(error), available, total);
  }
  RETURN_IF_FAILED(Check(*context, error, "allocate"));
  RETURN_IF_FAILED(Check(*context, cudaMemsetAsync(*memory, 0, bytes, context->stream), "clear what was allocated"));
  return 0;
}

int Free(DejavuCudaContext* context, void* memory) {
  RETURN_IF_FAILED(Enter(*context, "free"));
  RETURN_IF_FAILED(Check(*context, cudaFree(memory), "free"));
  return 0;
}

int AllocatePinned(DejavuCudaContext* context, int64_t bytes, void** memory) {
  RETURN_IF_FAILED(Enter(*context, "allocate pinned host memory"));
  RETURN_IF_FAILED(Check(*context, cudaMallocHost(memory, bytes), "allocate pinned host memory"));
  context->pinned[static_cast<const char*>(*memory)] = bytes;
  return 0;
}

int FreePinned(DejavuCudaContext* context, void* memory) {
  RETURN_IF_FAILED(Enter(*context, "free pinned host memory"));
  context->pinned.erase(static_cast<const char*>(memory));
  RETURN_IF_FAILED(Check(*context, cudaFreeHost(memory), "free pinned host memory"));
  return 0;
}

int Upload(DejavuCudaContext* context, DejavuCudaUpload upload) {
  return Copy(*context, upload.copy, cudaMemcpyHostToDevice, "upload");
}

int Fetch(DejavuCudaContext* context, DejavuCudaFetch fetch) {
  return Copy(*context, fetch.copy, cudaMemcpyDeviceToHost, "fetch");
}

int Synchronize(DejavuCudaContext* context) {
  RETURN_IF_FAILED(Enter(*context, "synchronize"));
  RETURN_IF_FAILED(AwaitStream(*context, "synchronize"));
  return 0;
}

int Download(DejavuCudaContext* context, DejavuCudaDownload download) {
  RETURN_IF_FAILED(Fetch(context, {download.copy}));
  return Synchronize(context);
}

}  // namespace dejavu::cuda
