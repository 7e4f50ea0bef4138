// The CUDA module: the table of abi.h over the CUDA runtime, and the kernels. It knows nothing of the model: a launch
// names a kernel by its number and brings its parameters. cudart and the C++ library are linked statically; cuBLASLt is
// loaded at the first gemm and NCCL for the first group, so that the module starts without them.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

#include "kernels/cuda/abi.h"
#include "kernels/cuda/kernels.cuh"
#include "kernels/cuda/module/blas.h"
#include "kernels/cuda/module/context.h"
#include "kernels/cuda/module/graphs.h"
#include "kernels/cuda/module/group.h"
#include "kernels/cuda/module/memory.h"
#include "kernels/cuda/params.h"

namespace dejavu::cuda {
namespace {

constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};  // of this build, such as 800, in ascending order

struct KernelEntry {
  const char* name;
  const void* function;
  uint32_t params_bytes;
};

template <typename Params>
KernelEntry MakeEntry(const char* name, void (*kernel)(Params)) {
  return {name, reinterpret_cast<const void*>(kernel), sizeof(Params)};
}

const KernelEntry kTable[] = {
#define DEJAVU_CUDA_KERNEL_ENTRY(name, params) MakeEntry<params>(#name, name),
    DEJAVU_CUDA_KERNELS(DEJAVU_CUDA_KERNEL_ENTRY)
#undef DEJAVU_CUDA_KERNEL_ENTRY
};
static_assert(sizeof(kTable) == kKernels * sizeof(KernelEntry));

std::string Architectures() {
  std::string text;
  for (int architecture : kArchitectures) {
    text +=
        (text.empty() ? "" : ", ") + std::to_string(architecture / 100) + "." + std::to_string(architecture / 10 % 10);
  }
  return text;
}

std::string CudaVersion(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

int FindDevice(int32_t device, cudaDeviceProp* properties) {
  int count = 0, driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaDriverGetVersion(&driver);  // 0: none
  if (error == cudaErrorInsufficientDriver && driver == 0) {
    return Fail(error, "no NVIDIA driver: libcuda.so.1 cannot be loaded (%s); a driver for CUDA %s or later is needed",
                cudaGetErrorName(error), CudaVersion(CUDART_VERSION).c_str());
  }
  if (error == cudaErrorInsufficientDriver) {
    return Fail(error, "the NVIDIA driver is for CUDA %s; one for CUDA %s or later is needed (%s)",
                CudaVersion(driver).c_str(), CudaVersion(CUDART_VERSION).c_str(), cudaGetErrorName(error));
  }
  if (error == cudaErrorNoDevice) {
    return Fail(error, "no CUDA device: there is a driver for CUDA %s, but it shows no GPU to this process (%s)",
                CudaVersion(driver).c_str(), cudaGetErrorName(error));
  }
  if (error != cudaSuccess) {
    return Fail(error, "counting the CUDA devices: %s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  }
  if (device < 0 || device >= count) {
    return Fail(cudaErrorInvalidDevice, "no CUDA device %d: this machine has %d, counted from 0", device, count);
  }
  const cudaError_t properties_error = cudaGetDeviceProperties(properties, device);
  if (properties_error != cudaSuccess) {
    return Fail(properties_error, "reading the properties of CUDA device %d: %s: %s", device,
                cudaGetErrorName(properties_error), cudaGetErrorString(properties_error));
  }
  if (properties->major * 100 + properties->minor * 10 < kArchitectures[0]) {
    return Fail(cudaErrorNoKernelImageForDevice,
                "CUDA device %d, %s, has compute capability %d.%d; this build is for %s and later", device,
                properties->name, properties->major, properties->minor, Architectures().c_str());
  }
  return 0;
}

// Loads every kernel now, so that none is loaded inside a step, and opens all of the shared memory to it. All of them
// ask for the same division of a multiprocessor's memory into shared memory and cache, the one with most of the former:
// it changes only when nothing runs there, so that kernels that ask for different ones would not overlap.
int LoadKernels(DejavuCudaContext& context, const cudaDeviceProp& properties) {
  for (const KernelEntry& kernel : kTable) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(properties.sharedMemPerBlockOptin - attributes.sharedSizeBytes));
    }
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    }
    if (error != cudaSuccess) {
      return Fail(error, "loading kernel %s on %s, compute capability %d.%d, from a build for %s: %s: %s", kernel.name,
                  properties.name, properties.major, properties.minor, Architectures().c_str(), cudaGetErrorName(error),
                  cudaGetErrorString(error));
    }
    context.kernels.push_back(attributes);
  }
  return 0;
}

void Describe(const cudaDeviceProp& properties, DejavuCudaDevice* info) {
  *info = {};
  snprintf(info->name, sizeof(info->name), "%s", properties.name);
  info->compute_major = properties.major;
  info->compute_minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  info->shared_bytes_per_block = static_cast<int32_t>(properties.sharedMemPerBlockOptin);
  info->shared_bytes_per_multiprocessor = static_cast<int32_t>(properties.sharedMemPerMultiprocessor);
  info->l2_bytes = properties.l2CacheSize;
  info->memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  size_t available = 0, total = 0;
  if (cudaMemGetInfo(&available, &total) == cudaSuccess) info->memory_free_bytes = static_cast<int64_t>(available);
  cudaDriverGetVersion(&info->driver_version);
  cudaRuntimeGetVersion(&info->runtime_version);
}

void Close(DejavuCudaContext* context) {
  if (context == nullptr) return;
  LeaveGroup(context);
  cudaSetDevice(context->device);
  if (context->stream != nullptr) cudaStreamSynchronize(context->stream);
  CloseBlas(*context);
  for (cudaEvent_t event : context->events) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  if (context->stream != nullptr) cudaStreamDestroy(context->stream);
  delete context;
}

int Open(int32_t device, DejavuCudaContext** context, DejavuCudaDevice* info) {
  cudaDeviceProp properties;
  RETURN_IF_FAILED(FindDevice(device, &properties));
  std::unique_ptr<DejavuCudaContext, void (*)(DejavuCudaContext*)> opened(new DejavuCudaContext, Close);
  opened->device = device;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&opened->stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) {
    return Fail(error, "opening CUDA device %d, %s: %s: %s", device, properties.name, cudaGetErrorName(error),
                cudaGetErrorString(error));
  }
  RETURN_IF_FAILED(LoadKernels(*opened, properties));
  Describe(properties, info);
  *context = opened.release();
  return 0;
}

int Launch(DejavuCudaContext* context, const DejavuCudaLaunch* launch) {
  RETURN_IF_FAILED(Enter(*context, "launch"));
  if (launch->kernel < 0 || launch->kernel >= kKernels) {
    return Fail(cudaErrorInvalidValue, "launch: there is no kernel %d; the module has %d", launch->kernel, kKernels);
  }
  const KernelEntry& kernel = kTable[launch->kernel];
  if (launch->params_bytes != kernel.params_bytes) {
    return Fail(cudaErrorInvalidValue, "launch of %s: parameters have %u bytes; the kernel takes %u", kernel.name,
                launch->params_bytes, kernel.params_bytes);
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = {launch->grid[0], launch->grid[1], launch->grid[2]};
  config.blockDim = {launch->block[0], launch->block[1], launch->block[2]};
  config.dynamicSmemBytes = launch->shared_bytes;
  config.stream = context->stream;
  config.attrs = &overlap;
  config.numAttrs = launch->overlaps != 0 ? 1 : 0;
  void* arguments[] = {const_cast<void*>(launch->params)};
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel.function, arguments);
  if (error != cudaSuccess) {
    char tried[256];
    snprintf(tried, sizeof(tried), "launch of %s, grid %u x %u x %u, block %u x %u x %u, %u bytes shared", kernel.name,
             launch->grid[0], launch->grid[1], launch->grid[2], launch->block[0], launch->block[1], launch->block[2],
             launch->shared_bytes);
    return CudaFailure(*context, error, tried);
  }
  context->last_launch = kernel.name;
  return 0;
}

int KernelInfo(DejavuCudaContext* context, int32_t kernel, DejavuCudaKernel* info) {
  if (kernel < 0 || kernel >= kKernels) {
    return Fail(cudaErrorInvalidValue, "there is no kernel %d; the module has %d", kernel, kKernels);
  }
  const cudaFuncAttributes& attributes = context->kernels[kernel];
  *info = {.name = kTable[kernel].name,
           .registers = attributes.numRegs,
           .shared_bytes = static_cast<int32_t>(attributes.sharedSizeBytes),
           .local_bytes = static_cast<int32_t>(attributes.localSizeBytes),
           .params_bytes = static_cast<int32_t>(kTable[kernel].params_bytes),
           .binary_version = attributes.binaryVersion,
           .ptx_version = attributes.ptxVersion};
  return 0;
}

}  // namespace
}  // namespace dejavu::cuda

extern "C" __attribute__((visibility("default"))) const DejavuCudaModule* DejavuCudaEntry() {
  using namespace dejavu::cuda;
  static const DejavuCudaModule module = {
      .abi_version = DEJAVU_CUDA_ABI_VERSION,
      .error = Error,
      .open = Open,
      .close = Close,
      .allocate = Allocate,
      .free = Free,
      .allocate_pinned = AllocatePinned,
      .free_pinned = FreePinned,
      .upload = Upload,
      .fetch = Fetch,
      .download = Download,
      .synchronize = Synchronize,
      .launch = Launch,
      .gemm = Gemm,
      .kernel_info = KernelInfo,
      .begin_capture = BeginCapture,
      .end_capture = EndCapture,
      .replay = Replay,
      .free_graph = FreeGraph,
      .stamp = Stamp,
      .wait = Wait,
      .elapsed_ms = ElapsedMs,
      .group_id = GroupId,
      .join_group = JoinGroup,
      .leave_group = LeaveGroup,
      .all_reduce = AllReduce,
      .join_all_reduce = JoinAllReduce,
      .limit_group = LimitGroup,
  };
  return &module;
}
