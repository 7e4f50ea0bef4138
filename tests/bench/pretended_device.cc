#include "tests/bench/pretended_device.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kernels/base/round.h"
#include "kernels/cuda/kernel_params.h"

namespace dejavu {
namespace {

struct Pretended {
  uintptr_t next = uintptr_t{1} << 40;  // address
};
Pretended& From(DejavuCudaContext* context) { return *reinterpret_cast<Pretended*>(context); }

constexpr int kDone = 0, kRefused = 1;

int Open(int32_t, DejavuCudaContext** context, DejavuCudaDevice* info) {
  *context = reinterpret_cast<DejavuCudaContext*>(new Pretended);
  *info = {.name = "H200 (pretended)",
           .compute_major = 9,
           .compute_minor = 0,
           .multiprocessors = 132,
           .shared_bytes_per_block = 227 << 10,
           .shared_bytes_per_multiprocessor = 228 << 10,
           .l2_bytes = 50 << 20,
           .memory_bytes = int64_t{1} << 40,
           .memory_free_bytes = int64_t{1} << 40,
           .driver_version = 13000,
           .runtime_version = 13000};
  return kDone;
}

int Allocate(DejavuCudaContext* context, int64_t bytes, void** memory) {
  constexpr int64_t kAlignment = 256;
  *memory = reinterpret_cast<void*>(From(context).next);
  From(context).next += RoundUp(bytes, kAlignment);
  return kDone;
}

int AllocatePinned(DejavuCudaContext*, int64_t bytes, void** memory) {
  *memory = std::malloc(bytes);
  return *memory != nullptr ? kDone : kRefused;
}

int FreePinned(DejavuCudaContext*, void* memory) {
  std::free(memory);
  return kDone;
}

int Clear(const DejavuCudaCopy& copy) {
  for (int64_t row = 0; row < copy.rows; ++row) {
    std::memset(static_cast<char*>(copy.to) + row * copy.to_stride, 0, copy.row_bytes);
  }
  return kDone;
}

int KernelInfo(DejavuCudaContext*, int32_t kernel, DejavuCudaKernel* info) {
  *info = {.name = cuda::NameOf(static_cast<cuda::Kernel>(kernel)),
           .registers = 0,
           .shared_bytes = 0,
           .local_bytes = 0,
           .params_bytes = 0,
           .binary_version = 90,
           .ptx_version = 90};
  return kDone;
}

}  // namespace

const DejavuCudaModule* PretendedModule() {
  static const DejavuCudaModule module = {
      .abi_version = DEJAVU_CUDA_ABI_VERSION,
      .error = [] { return "a pretended device has none of this"; },
      .open = Open,
      .close = [](DejavuCudaContext* context) { delete &From(context); },
      .allocate = Allocate,
      .free = [](DejavuCudaContext*, void*) { return kDone; },
      .allocate_pinned = AllocatePinned,
      .free_pinned = FreePinned,
      .upload = [](DejavuCudaContext*, DejavuCudaUpload) { return kDone; },
      .fetch = [](DejavuCudaContext*, DejavuCudaFetch fetch) { return Clear(fetch.copy); },
      .download = [](DejavuCudaContext*, DejavuCudaDownload download) { return Clear(download.copy); },
      .synchronize = [](DejavuCudaContext*) { return kDone; },
      .launch = [](DejavuCudaContext*, const DejavuCudaLaunch*) { return kDone; },
      .gemm = [](DejavuCudaContext*, const DejavuCudaGemm*) { return kDone; },
      .kernel_info = KernelInfo,
      .begin_capture = [](DejavuCudaContext*) { return kRefused; },
      .end_capture = [](DejavuCudaContext*, DejavuCudaGraph**) { return kRefused; },
      .replay = [](DejavuCudaContext*, DejavuCudaGraph*) { return kRefused; },
      .free_graph = [](DejavuCudaContext*, DejavuCudaGraph*) {},
      .stamp = [](DejavuCudaContext*, int32_t) { return kDone; },
      .wait = [](DejavuCudaContext*, int32_t) { return kDone; },
      .elapsed_ms = [](DejavuCudaContext*, int32_t, int32_t, float*) { return kRefused; },
      .group_id = [](char*) { return kRefused; },
      .join_group = [](DejavuCudaContext*, const char*, int32_t, int32_t, double, int64_t*) { return kRefused; },
      .leave_group = [](DejavuCudaContext*) {},
      .all_reduce = [](DejavuCudaContext*, float*, int64_t, int32_t) { return kRefused; },
      .join_all_reduce = [](DejavuCudaContext*) { return kRefused; },
      .limit_group = [](DejavuCudaContext*, double) { return kRefused; }};
  return &module;
}

}  // namespace dejavu
