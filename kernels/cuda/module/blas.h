// Products by cuBLASLt, which is loaded at the first one of the process and opened at the first one of a context. How
// to do products of a shape is asked once.
#ifndef KERNELS_CUDA_MODULE_BLAS_H_
#define KERNELS_CUDA_MODULE_BLAS_H_

#include "kernels/cuda/module/context.h"

namespace dejavu::cuda {

// Of the table (kernels/cuda/abi.h).
int Gemm(DejavuCudaContext* context, const DejavuCudaGemm* gemm);

// When the context's stream has come to its end.
void CloseBlas(DejavuCudaContext& context);

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_MODULE_BLAS_H_
