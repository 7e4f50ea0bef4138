// The emulated device's memory, on the heap in exact sizes, and copies. A fetch fills its target with NaN until the
// host has waited; the source of an upload from pinned memory is checked for changes.
#ifndef TESTS_SIMT_EMULATED_MEMORY_H_
#define TESTS_SIMT_EMULATED_MEMORY_H_

#include <cstdint>

#include "absl/status/status.h"
#include "emulated_context.h"

namespace dejavu::simt {

bool Within(const Allocations& memory, const void* begin, int64_t bytes);

// Of the table (kernels/cuda/abi.h).
absl::Status Allocate(DejavuCudaContext* context, int64_t bytes, void** memory);
absl::Status Free(DejavuCudaContext* context, void* memory);
absl::Status AllocatePinned(DejavuCudaContext* context, int64_t bytes, void** memory);
absl::Status FreePinned(DejavuCudaContext* context, void* memory);
absl::Status Upload(DejavuCudaContext* context, DejavuCudaUpload upload);
absl::Status Fetch(DejavuCudaContext* context, DejavuCudaFetch fetch);
absl::Status Download(DejavuCudaContext* context, DejavuCudaDownload download);

}  // namespace dejavu::simt

#endif  // TESTS_SIMT_EMULATED_MEMORY_H_
