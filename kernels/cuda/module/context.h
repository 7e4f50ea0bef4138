// What a call of the module works on, and how a call fails: with a number that is returned and a message that Error
// gives. Every function of the table that touches the device begins with Enter.
#ifndef KERNELS_CUDA_MODULE_CONTEXT_H_
#define KERNELS_CUDA_MODULE_CONTEXT_H_

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/abi.h"
#include "kernels/cuda/module/nccl_group.h"

namespace dejavu::cuda {

struct Blas;  // in blas.cu

constexpr int kEvents = 66;

}  // namespace dejavu::cuda

struct DejavuCudaContext {
  int device = 0;
  cudaStream_t stream = nullptr;
  std::vector<cudaFuncAttributes> kernels;                // [kKernels]
  std::map<const char*, int64_t, std::greater<>> pinned;  // begin -> bytes
  cudaEvent_t events[dejavu::cuda::kEvents] = {};
  dejavu::cuda::Blas* blas = nullptr;  // from the first gemm on
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

// The message of the calling thread's last failure.
const char* Error();

// Sets the message; returns `code`.
__attribute__((format(printf, 2, 3))) int Fail(int code, const char* format, ...);

// After Fail: takes the error that the message tells of from the device. If the device is lost, adds what was launched
// last to the message, and keeps it for ever.
int Conclude(DejavuCudaContext& context, int code);

int CudaFailure(DejavuCudaContext& context, cudaError_t error, const char* tried);

// 0, or CudaFailure.
int Check(DejavuCudaContext& context, cudaError_t error, const char* tried);

// What every call begins with. The current device is the thread's own, and a context may be handed between threads.
int Enter(DejavuCudaContext& context, const char* tried);

#define RETURN_IF_FAILED(call)                      \
  do {                                              \
    if (const int failure = (call)) return failure; \
  } while (false)

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_MODULE_CONTEXT_H_
