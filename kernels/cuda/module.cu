// The CUDA module: the table of abi.h over the CUDA runtime, and the kernels. It knows nothing of the model: a launch
// names a kernel by its number and brings its parameters. cudart and the C++ library are linked statically; cuBLAS is
// loaded at the first gemm and NCCL for the first group, so that the module starts without them.
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "kernels/cuda/abi.h"
#include "kernels/cuda/kernels.cuh"
#include "kernels/cuda/nccl_group.h"
#include "kernels/cuda/params.h"

struct DejavuCudaGraph {
  ~DejavuCudaGraph() {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  cudaGraphExec_t graph = nullptr;
};

namespace dejavu::cuda {
namespace {

constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};  // of this build, such as 800, in ascending order
constexpr int kEvents = 66;
constexpr int64_t kBlasWorkspaceBytes = 32 << 20;
constexpr double kSpinS = 0.05;  // longer than a step that decodes
constexpr std::chrono::microseconds kPoll(100);

thread_local char error_text[2048] = "";

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

// cuBLAS, as far as it is used.
struct Blas {
  std::string missing;  // why there is none; empty: there is
  decltype(&cublasCreate_v2) create;
  decltype(&cublasDestroy_v2) destroy;
  decltype(&cublasSetStream_v2) set_stream;
  decltype(&cublasSetWorkspace_v2) set_workspace;
  decltype(&cublasSetMathMode) set_math_mode;
  decltype(&cublasGemmEx_64) gemm;
  decltype(&cublasGetStatusString) status_string;
};

}  // namespace
}  // namespace dejavu::cuda

struct DejavuCudaContext {
  int device = 0;
  cudaStream_t stream = nullptr;
  std::vector<cudaFuncAttributes> kernels;                // [kKernels]
  std::map<const char*, int64_t, std::greater<>> pinned;  // begin -> bytes
  cudaEvent_t events[dejavu::cuda::kEvents] = {};
  cublasHandle_t blas = nullptr;  // from the first gemm on
  void* blas_workspace = nullptr;
  bool can_overlap = false;
  bool capturing = false;
  std::unique_ptr<dejavu::cuda::NcclGroup> group;
  // With a group: where an all-reduce aside runs, the event that it waits for and the one that it ends with.
  cudaStream_t aside = nullptr;
  cudaEvent_t fork = nullptr, join = nullptr;
  double group_limit_s = INFINITY;
  const char* last_launch = "nothing";
  // The first error after which nothing works any more, as CUDA's sticky errors are. Reported for ever.
  int failure = 0;
  std::string failure_text;
};

namespace dejavu::cuda {
namespace {

__attribute__((format(printf, 2, 3))) int Fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error_text, sizeof(error_text), format, arguments);
  va_end(arguments);
  return code;
}

// Whether calls will go on failing, once the error that is only noted has been taken away.
bool IsBroken(const DejavuCudaContext& context) {
  cudaGetLastError();
  if (context.capturing) return false;  // the query would end the capture
  const cudaError_t error = cudaStreamQuery(context.stream);
  cudaGetLastError();
  return error != cudaSuccess && error != cudaErrorNotReady;
}

// Takes the error that error_text tells of. If the device is lost, adds what was launched last, and keeps it for ever.
int Conclude(DejavuCudaContext& context, int code) {
  if (IsBroken(context)) {
    context.failure = code;
    context.failure_text = std::string(error_text) + "; launched last: " + context.last_launch;
    Fail(code, "%s", context.failure_text.c_str());
  }
  return code;
}

int CudaFailure(DejavuCudaContext& context, cudaError_t error, const char* tried) {
  return Conclude(context, Fail(error, "%s: %s: %s", tried, cudaGetErrorName(error), cudaGetErrorString(error)));
}

int Check(DejavuCudaContext& context, cudaError_t error, const char* tried) {
  return error == cudaSuccess ? 0 : CudaFailure(context, error, tried);
}

// What every call begins with. The current device is the thread's own, and a context may be handed between threads.
int Enter(DejavuCudaContext& context, const char* tried) {
  if (context.failure != 0) return Fail(context.failure, "%s", context.failure_text.c_str());
  return Check(context, cudaSetDevice(context.device), tried);
}

#define RETURN_IF_FAILED(call)                      \
  do {                                              \
    if (const int failure = (call)) return failure; \
  } while (false)

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

// Loads every kernel now, so that none is loaded inside a step, and opens all of the shared memory to it.
int LoadKernels(DejavuCudaContext& context, const cudaDeviceProp& properties) {
  for (const KernelEntry& kernel : kTable) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(properties.sharedMemPerBlockOptin - attributes.sharedSizeBytes));
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

Blas LoadBlas() {
  Blas blas = {};
  void* library = nullptr;
  for (const std::string& name : {"libcublas.so." + std::to_string(CUBLAS_VER_MAJOR), std::string("libcublas.so")}) {
    if (library != nullptr) break;
    library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) blas.missing += (blas.missing.empty() ? "" : "; ") + std::string(dlerror());
  }
  if (library == nullptr) return blas;
  blas.missing.clear();
  const auto resolve = [&](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
    if (*function == nullptr && blas.missing.empty()) blas.missing = dlerror();
  };
  resolve("cublasCreate_v2", &blas.create);
  resolve("cublasDestroy_v2", &blas.destroy);
  resolve("cublasSetStream_v2", &blas.set_stream);
  resolve("cublasSetWorkspace_v2", &blas.set_workspace);
  resolve("cublasSetMathMode", &blas.set_math_mode);
  resolve("cublasGemmEx_64", &blas.gemm);
  resolve("cublasGetStatusString", &blas.status_string);
  return blas;
}

const Blas& GetBlas() {
  static const Blas blas = LoadBlas();
  return blas;
}

int BlasFailure(DejavuCudaContext& context, cublasStatus_t status, const char* tried) {
  return Conclude(context, Fail(status, "%s: %s", tried, GetBlas().status_string(status)));
}

int OpenBlas(DejavuCudaContext& context) {
  if (context.capturing) {
    return Fail(cudaErrorStreamCaptureUnsupported, "gemm: the first one of a context cannot be captured");
  }
  const Blas& blas = GetBlas();
  if (!blas.missing.empty()) {
    return Fail(cudaErrorSharedObjectInitFailed, "gemm: cuBLAS cannot be used: %s", blas.missing.c_str());
  }
  RETURN_IF_FAILED(Check(context, cudaMalloc(&context.blas_workspace, kBlasWorkspaceBytes), "gemm: its workspace"));
  cublasHandle_t handle = nullptr;
  cublasStatus_t status = blas.create(&handle);
  if (status == CUBLAS_STATUS_SUCCESS) status = blas.set_stream(handle, context.stream);
  // Setting the stream resets the workspace: this order. A workspace of its own makes a product the same every time.
  if (status == CUBLAS_STATUS_SUCCESS) {
    status = blas.set_workspace(handle, context.blas_workspace, kBlasWorkspaceBytes);
  }
  if (status == CUBLAS_STATUS_SUCCESS) {
    status = blas.set_math_mode(
        handle, static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
  }
  if (status == CUBLAS_STATUS_SUCCESS) {
    context.blas = handle;
    return 0;
  }
  if (handle != nullptr) blas.destroy(handle);
  cudaFree(context.blas_workspace);
  context.blas_workspace = nullptr;
  return BlasFailure(context, status, "gemm: opening cuBLAS");
}

bool IsPinned(const DejavuCudaContext& context, const void* memory) {
  const char* const at = static_cast<const char*>(memory);
  const auto block = context.pinned.lower_bound(at);  // descending: the last one that begins at or before `at`
  return block != context.pinned.end() && at < block->first + block->second;
}

// After which the ranks no longer do the same.
int LoseGroup(DejavuCudaContext& context, int code, const std::string& why) {
  context.failure = code;
  context.failure_text = why + "; launched last: " + context.last_launch;
  context.group->Abort();
  return Fail(code, "%s", context.failure_text.c_str());
}

// Until `query` says something else than cudaErrorNotReady. In a group what is under way may be an all-reduce that some
// rank never comes to, so the device is asked again and again.
template <typename Query>
int AwaitGroup(DejavuCudaContext& context, const Query& query, const char* tried) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  while (true) {
    const cudaError_t error = query();
    if (error != cudaErrorNotReady) return Check(context, error, tried);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (seconds < kSpinS) continue;
    const int rank = context.group->rank(), size = context.group->size();
    const std::string trouble = context.group->Trouble();
    char why[1024] = "";
    if (!trouble.empty()) {
      snprintf(why, sizeof(why), "%s: rank %d of %d: %s", tried, rank, size, trouble.c_str());
    } else if (seconds > context.group_limit_s) {
      snprintf(why, sizeof(why), "%s: rank %d of %d waited %g s for its GPU and the other ranks", tried, rank, size,
               context.group_limit_s);
    }
    if (why[0] != '\0') return LoseGroup(context, DEJAVU_CUDA_PEER_LOST, why);
    std::this_thread::sleep_for(kPoll);
  }
}

bool HasPeers(const DejavuCudaContext& context) { return context.group != nullptr && context.group->size() > 1; }

int AwaitStream(DejavuCudaContext& context, const char* tried) {
  if (!HasPeers(context)) return Check(context, cudaStreamSynchronize(context.stream), tried);
  return AwaitGroup(
      context, [&] { return cudaStreamQuery(context.stream); }, tried);
}

int AwaitEvent(DejavuCudaContext& context, cudaEvent_t event, const char* tried) {
  if (!HasPeers(context)) return Check(context, cudaEventSynchronize(event), tried);
  return AwaitGroup(
      context, [&] { return cudaEventQuery(event); }, tried);
}

int Copy(DejavuCudaContext* context, void* to, int64_t to_stride, const void* from, int64_t from_stride,
         int64_t row_bytes, int64_t rows, cudaMemcpyKind kind, const char* tried) {
  RETURN_IF_FAILED(Enter(*context, tried));
  const bool pinned = IsPinned(*context, kind == cudaMemcpyHostToDevice ? from : to);
  if (context->capturing && !pinned) {
    return Fail(cudaErrorStreamCaptureUnsupported, "%s: pageable memory cannot be part of a graph", tried);
  }
  if (row_bytes == 0 || rows == 0) return 0;
  const bool packed = rows == 1 || (to_stride == row_bytes && from_stride == row_bytes);
  RETURN_IF_FAILED(
      Check(*context,
            packed ? cudaMemcpyAsync(to, from, row_bytes * rows, kind, context->stream)
                   : cudaMemcpy2DAsync(to, to_stride, from, from_stride, row_bytes, rows, kind, context->stream),
            tried));
  // Whether CUDA has read pageable memory when the copy returns depends on the machine.
  if (!pinned) RETURN_IF_FAILED(AwaitStream(*context, tried));
  return 0;
}

// The table.

const char* Error() { return error_text; }

void LeaveGroup(DejavuCudaContext* context) {
  if (context->group == nullptr) return;
  cudaSetDevice(context->device);
  if (context->failure == 0) AwaitStream(*context, "leaving a group");
  if (context->failure != 0) context->group->Abort();
  context->group.reset();
  for (cudaEvent_t* event : {&context->fork, &context->join}) {
    if (*event != nullptr) cudaEventDestroy(*event);
    *event = nullptr;
  }
  if (context->aside != nullptr) cudaStreamDestroy(context->aside);
  context->aside = nullptr;
}

void Close(DejavuCudaContext* context) {
  if (context == nullptr) return;
  LeaveGroup(context);
  cudaSetDevice(context->device);
  if (context->stream != nullptr) cudaStreamSynchronize(context->stream);
  if (context->blas != nullptr) GetBlas().destroy(context->blas);
  cudaFree(context->blas_workspace);
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
  opened->can_overlap = properties.major >= 9;
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

int Upload(DejavuCudaContext* context, void* to, int64_t to_stride, const void* from, int64_t from_stride,
           int64_t row_bytes, int64_t rows) {
  return Copy(context, to, to_stride, from, from_stride, row_bytes, rows, cudaMemcpyHostToDevice, "upload");
}

int Fetch(DejavuCudaContext* context, void* to, int64_t to_stride, const void* from, int64_t from_stride,
          int64_t row_bytes, int64_t rows) {
  return Copy(context, to, to_stride, from, from_stride, row_bytes, rows, cudaMemcpyDeviceToHost, "fetch");
}

int Synchronize(DejavuCudaContext* context) {
  RETURN_IF_FAILED(Enter(*context, "synchronize"));
  RETURN_IF_FAILED(AwaitStream(*context, "synchronize"));
  return 0;
}

int Download(DejavuCudaContext* context, void* to, int64_t to_stride, const void* from, int64_t from_stride,
             int64_t row_bytes, int64_t rows) {
  RETURN_IF_FAILED(Fetch(context, to, to_stride, from, from_stride, row_bytes, rows));
  return Synchronize(context);
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
  config.numAttrs = launch->overlaps != 0 && context->can_overlap ? 1 : 0;
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

int Gemm(DejavuCudaContext* context, const DejavuCudaGemm* g) {
  RETURN_IF_FAILED(Enter(*context, "gemm"));
  if (context->blas == nullptr) RETURN_IF_FAILED(OpenBlas(*context));
  // cuBLAS counts columns first, so it sees every matrix transposed: c^T [n, m] = b^(T) a^T.
  const float one = 1.0f, beta = g->accumulate != 0 ? 1.0f : 0.0f;
  const cudaDataType_t type = g->bfloat16 != 0 ? CUDA_R_16BF : CUDA_R_16F;
  const cublasStatus_t status =
      GetBlas().gemm(context->blas, g->b_is_kn != 0 ? CUBLAS_OP_N : CUBLAS_OP_T, CUBLAS_OP_N, g->n, g->m, g->k, &one,
                     g->b, type, g->b_stride, g->a, type, g->a_stride, &beta, g->c, CUDA_R_32F, g->c_stride,
                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
  if (status != CUBLAS_STATUS_SUCCESS) {
    char tried[128];
    snprintf(tried, sizeof(tried), "gemm of m = %lld, n = %lld, k = %lld", static_cast<long long>(g->m),
             static_cast<long long>(g->n), static_cast<long long>(g->k));
    return BlasFailure(*context, status, tried);
  }
  context->last_launch = "a gemm";
  return 0;
}

int KernelInfo(DejavuCudaContext* context, int32_t kernel, DejavuCudaKernel* info) {
  if (kernel < 0 || kernel >= kKernels) {
    return Fail(cudaErrorInvalidValue, "there is no kernel %d; the module has %d", kernel, kKernels);
  }
  const cudaFuncAttributes& attributes = context->kernels[kernel];
  *info = {kTable[kernel].name, attributes.numRegs, static_cast<int32_t>(attributes.sharedSizeBytes),
           static_cast<int32_t>(attributes.localSizeBytes), static_cast<int32_t>(kTable[kernel].params_bytes)};
  return 0;
}

int BeginCapture(DejavuCudaContext* context) {
  RETURN_IF_FAILED(Enter(*context, "begin capture"));
  RETURN_IF_FAILED(
      Check(*context, cudaStreamBeginCapture(context->stream, cudaStreamCaptureModeThreadLocal), "begin capture"));
  context->capturing = true;
  return 0;
}

int EndCapture(DejavuCudaContext* context, DejavuCudaGraph** graph) {
  RETURN_IF_FAILED(Enter(*context, "end capture"));
  context->capturing = false;
  cudaGraph_t captured = nullptr;
  RETURN_IF_FAILED(Check(*context, cudaStreamEndCapture(context->stream, &captured), "end capture"));
  auto made = std::make_unique<DejavuCudaGraph>();
  cudaError_t error = cudaGraphInstantiate(&made->graph, captured, 0);
  cudaGraphDestroy(captured);
  // Now rather than within the first replay.
  if (error == cudaSuccess) error = cudaGraphUpload(made->graph, context->stream);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is not sticky
    *graph = nullptr;
    return 0;
  }
  RETURN_IF_FAILED(Check(*context, error, "instantiate a graph"));
  *graph = made.release();
  return 0;
}

int Replay(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  RETURN_IF_FAILED(Enter(*context, "replay"));
  RETURN_IF_FAILED(Check(*context, cudaGraphLaunch(graph->graph, context->stream), "replay"));
  context->last_launch = "a graph";
  return 0;
}

void FreeGraph(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  cudaSetDevice(context->device);
  delete graph;
}

int Stamp(DejavuCudaContext* context, int32_t event) {
  RETURN_IF_FAILED(Enter(*context, "stamp"));
  if (event < 0 || event >= kEvents) return Fail(cudaErrorInvalidValue, "stamp: there is no event %d", event);
  if (context->events[event] == nullptr) {
    RETURN_IF_FAILED(Check(*context, cudaEventCreate(&context->events[event]), "stamp"));
  }
  // External: a stamp of its own in the graph, and not just an order of its launches.
  RETURN_IF_FAILED(
      Check(*context,
            cudaEventRecordWithFlags(context->events[event], context->stream,
                                     context->capturing ? cudaEventRecordExternal : cudaEventRecordDefault),
            "stamp"));
  return 0;
}

int Wait(DejavuCudaContext* context, int32_t event) {
  RETURN_IF_FAILED(Enter(*context, "wait"));
  if (event < 0 || event >= kEvents || context->events[event] == nullptr) {
    return Fail(cudaErrorInvalidValue, "wait: event %d was never stamped", event);
  }
  RETURN_IF_FAILED(AwaitEvent(*context, context->events[event], "wait"));
  return 0;
}

int ElapsedMs(DejavuCudaContext* context, int32_t from, int32_t to, float* ms) {
  RETURN_IF_FAILED(Enter(*context, "elapsed time"));
  for (const int32_t event : {from, to}) {
    if (event < 0 || event >= kEvents || context->events[event] == nullptr) {
      return Fail(cudaErrorInvalidValue, "elapsed time: event %d was never stamped", event);
    }
  }
  RETURN_IF_FAILED(AwaitEvent(*context, context->events[to], "elapsed time"));
  RETURN_IF_FAILED(
      Check(*context, cudaEventElapsedTime(ms, context->events[from], context->events[to]), "elapsed time"));
  return 0;
}

int GroupId(char* id) {
  const std::string why = NcclGroup::MakeId(id);
  return why.empty() ? 0 : Fail(cudaErrorUnknown, "%s", why.c_str());
}

int JoinGroup(DejavuCudaContext* context, const char* id, int32_t rank, int32_t size, double seconds,
              int64_t* memory_free_bytes) {
  RETURN_IF_FAILED(Enter(*context, "joining a group"));
  if (context->group != nullptr) return Fail(cudaErrorInvalidValue, "joining a group: the context is in one");
  const std::string why = NcclGroup::Join(context->device, id, rank, size, seconds, &context->group);
  if (!why.empty()) return Fail(cudaErrorUnknown, "%s", why.c_str());
  RETURN_IF_FAILED(
      Check(*context, cudaStreamCreateWithFlags(&context->aside, cudaStreamNonBlocking), "joining a group"));
  for (cudaEvent_t* event : {&context->fork, &context->join}) {
    RETURN_IF_FAILED(Check(*context, cudaEventCreateWithFlags(event, cudaEventDisableTiming), "joining a group"));
  }
  size_t available = 0, total = 0;
  RETURN_IF_FAILED(Check(*context, cudaMemGetInfo(&available, &total), "joining a group"));
  *memory_free_bytes = static_cast<int64_t>(available);
  return 0;
}

// `to` goes on when `from` has come as far as it has been queued.
int Follow(DejavuCudaContext& context, cudaStream_t to, cudaStream_t from, cudaEvent_t event) {
  RETURN_IF_FAILED(Check(context, cudaEventRecord(event, from), "all-reduce aside"));
  return Check(context, cudaStreamWaitEvent(to, event, 0), "all-reduce aside");
}

int AllReduce(DejavuCudaContext* context, float* data, int64_t count, int32_t aside) {
  RETURN_IF_FAILED(Enter(*context, "all-reduce"));
  if (context->group == nullptr) return Fail(cudaErrorInvalidValue, "all-reduce: the context is in no group");
  if (aside) RETURN_IF_FAILED(Follow(*context, context->aside, context->stream, context->fork));
  bool peer_lost = false;
  const std::string why = context->group->AllReduce(data, count, aside ? context->aside : context->stream, &peer_lost);
  if (!why.empty()) return LoseGroup(*context, peer_lost ? DEJAVU_CUDA_PEER_LOST : cudaErrorUnknown, why);
  context->last_launch = "an all-reduce";
  return 0;
}

int JoinAllReduce(DejavuCudaContext* context) {
  RETURN_IF_FAILED(Enter(*context, "all-reduce aside"));
  if (context->group == nullptr) return Fail(cudaErrorInvalidValue, "all-reduce: the context is in no group");
  return Follow(*context, context->stream, context->aside, context->join);
}

int LimitGroup(DejavuCudaContext* context, double seconds) {
  context->group_limit_s = seconds;
  return 0;
}

}  // namespace
}  // namespace dejavu::cuda

extern "C" __attribute__((visibility("default"))) const DejavuCudaModule* DejavuCudaEntry() {
  using namespace dejavu::cuda;
  static const DejavuCudaModule module = {DEJAVU_CUDA_ABI_VERSION,
                                          Error,
                                          Open,
                                          Close,
                                          Allocate,
                                          Free,
                                          AllocatePinned,
                                          FreePinned,
                                          Upload,
                                          Fetch,
                                          Download,
                                          Synchronize,
                                          Launch,
                                          Gemm,
                                          KernelInfo,
                                          BeginCapture,
                                          EndCapture,
                                          Replay,
                                          FreeGraph,
                                          Stamp,
                                          Wait,
                                          ElapsedMs,
                                          GroupId,
                                          JoinGroup,
                                          LeaveGroup,
                                          AllReduce,
                                          JoinAllReduce,
                                          LimitGroup};
  return &module;
}
