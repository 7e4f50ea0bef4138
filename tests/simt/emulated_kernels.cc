// The kernels of the CUDA backend as the emulated module's.
#include "emulated_module.h"
#include "kernels/cuda/kernels.cuh"
#include "kernels/cuda/params.h"

namespace dejavu::cuda {
namespace {

std::vector<simt::ModuleKernel> Kernels() { return {DEJAVU_CUDA_KERNELS(DEJAVU_SIMT_MODULE_KERNEL)}; }

}  // namespace
}  // namespace dejavu::cuda

std::span<const dejavu::simt::ModuleKernel> dejavu::simt::ModuleKernels() {
  static const std::vector<ModuleKernel> kernels = cuda::Kernels();
  return kernels;
}
