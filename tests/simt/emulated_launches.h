// Launches and products of the emulated module.
#ifndef TESTS_SIMT_EMULATED_LAUNCHES_H_
#define TESTS_SIMT_EMULATED_LAUNCHES_H_

#include <cstdint>

#include "absl/status/status.h"
#include "emulated_context.h"

namespace dejavu::simt {

// Of the table (kernels/cuda/abi.h).
absl::Status LaunchKernel(DejavuCudaContext* context, const DejavuCudaLaunch* launch);
absl::Status Gemm(DejavuCudaContext* context, const DejavuCudaGemm* gemm);
absl::Status KernelInfo(DejavuCudaContext* context, int32_t kernel, DejavuCudaKernel* info);

}  // namespace dejavu::simt

#endif  // TESTS_SIMT_EMULATED_LAUNCHES_H_
