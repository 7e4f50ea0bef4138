#include "kernels/cuda/module/blas.h"

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <string>

#include "kernels/cuda/module/shared_library.h"

namespace dejavu::cuda {
namespace {

constexpr int64_t kBlasWorkspaceBytes = 32 << 20;

// cuBLAS, as far as it is used.
struct Blas {
  SharedLibrary library;
  decltype(&cublasCreate_v2) create = nullptr;
  decltype(&cublasDestroy_v2) destroy = nullptr;
  decltype(&cublasSetStream_v2) set_stream = nullptr;
  decltype(&cublasSetWorkspace_v2) set_workspace = nullptr;
  decltype(&cublasSetMathMode) set_math_mode = nullptr;
  decltype(&cublasGemmEx_64) gemm = nullptr;
  decltype(&cublasGetStatusString) status_string = nullptr;
};

Blas LoadBlas() {
  Blas blas;
  blas.library.Load({"libcublas.so." + std::to_string(CUBLAS_VER_MAJOR), "libcublas.so"});
  blas.library.Resolve("cublasCreate_v2", &blas.create);
  blas.library.Resolve("cublasDestroy_v2", &blas.destroy);
  blas.library.Resolve("cublasSetStream_v2", &blas.set_stream);
  blas.library.Resolve("cublasSetWorkspace_v2", &blas.set_workspace);
  blas.library.Resolve("cublasSetMathMode", &blas.set_math_mode);
  blas.library.Resolve("cublasGemmEx_64", &blas.gemm);
  blas.library.Resolve("cublasGetStatusString", &blas.status_string);
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
  if (!blas.library.missing().empty()) {
    return Fail(cudaErrorSharedObjectInitFailed, "gemm: cuBLAS cannot be used: %s", blas.library.missing().c_str());
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

}  // namespace

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

void CloseBlas(DejavuCudaContext& context) {
  if (context.blas != nullptr) GetBlas().destroy(context.blas);
  cudaFree(context.blas_workspace);
}

}  // namespace dejavu::cuda
