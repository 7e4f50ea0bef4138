#include "kernels/cuda/module/blas.h"

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <string>

#include "kernels/cuda/module/shared_library.h"

namespace dejavu::cuda {
namespace {

constexpr size_t kBlasWorkspaceBytes = 32 << 20;
constexpr size_t kMostPlans = 4096;

// cuBLASLt, as far as it is used.
struct Library {
  SharedLibrary library;
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtMatmulDescCreate) create_product = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_product = nullptr;
  decltype(&cublasLtMatmulDescDestroy) destroy_product = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) create_layout = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) destroy_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) create_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) choose = nullptr;
  decltype(&cublasLtMatmul) multiply = nullptr;
  decltype(&cublasLtGetStatusString) status_string = nullptr;
};

Library LoadLibrary() {
  Library lt;
  lt.library.Load({"libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR), "libcublasLt.so"});
  lt.library.Resolve("cublasLtCreate", &lt.create);
  lt.library.Resolve("cublasLtDestroy", &lt.destroy);
  lt.library.Resolve("cublasLtMatmulDescCreate", &lt.create_product);
  lt.library.Resolve("cublasLtMatmulDescSetAttribute", &lt.set_product);
  lt.library.Resolve("cublasLtMatmulDescDestroy", &lt.destroy_product);
  lt.library.Resolve("cublasLtMatrixLayoutCreate", &lt.create_layout);
  lt.library.Resolve("cublasLtMatrixLayoutDestroy", &lt.destroy_layout);
  lt.library.Resolve("cublasLtMatmulPreferenceCreate", &lt.create_preference);
  lt.library.Resolve("cublasLtMatmulPreferenceSetAttribute", &lt.set_preference);
  lt.library.Resolve("cublasLtMatmulPreferenceDestroy", &lt.destroy_preference);
  lt.library.Resolve("cublasLtMatmulAlgoGetHeuristic", &lt.choose);
  lt.library.Resolve("cublasLtMatmul", &lt.multiply);
  lt.library.Resolve("cublasLtGetStatusString", &lt.status_string);
  return lt;
}

const Library& Lt() {
  static const Library lt = LoadLibrary();
  return lt;
}

// All that a choice hangs on.
using Shape = std::array<int64_t, 13>;

// The largest power of two up to 256 that divides the address, as the library counts alignment.
uint32_t AlignmentOf(const void* address) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(address) | 256;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

Shape ShapeOf(const DejavuCudaGemm& g) {
  return {g.m,
          g.n,
          g.k,
          g.a_stride,
          g.b_stride,
          g.c_stride,
          g.bfloat16,
          g.b_is_kn,
          g.relu,
          AlignmentOf(g.a),
          AlignmentOf(g.b),
          AlignmentOf(g.c),
          g.bias != nullptr ? AlignmentOf(g.bias) : 0};
}

// How products of a shape are done. The library counts columns first, so it sees every matrix transposed: c^T [n, m] =
// b^(T) a^T, and the bias goes along the rows of c^T.
class Plan {
 public:
  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (product_ != nullptr) Lt().destroy_product(product_);
    for (const cublasLtMatrixLayout_t layout : {a_, b_, c_}) {
      if (layout != nullptr) Lt().destroy_layout(layout);
    }
  }

  cublasStatus_t Make(cublasLtHandle_t handle, const DejavuCudaGemm& g) {
    const cudaDataType_t type = g.bfloat16 != 0 ? CUDA_R_16BF : CUDA_R_16F;
    const cublasOperation_t as_it_is = g.b_is_kn != 0 ? CUBLAS_OP_N : CUBLAS_OP_T;
    const cublasLtEpilogue_t epilogue = g.relu != 0
                                            ? g.bias != nullptr ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU
                                        : g.bias != nullptr ? CUBLASLT_EPILOGUE_BIAS
                                                            : CUBLASLT_EPILOGUE_DEFAULT;
    cublasStatus_t status = Lt().create_product(&product_, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    Then(status, [&] { return Set(CUBLASLT_MATMUL_DESC_TRANSA, as_it_is); });
    Then(status, [&] { return Set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue); });
    Then(status, [&] { return SetBias(g.bias); });
    Then(status, [&] {
      return g.b_is_kn != 0 ? Lt().create_layout(&b_, type, g.n, g.k, g.b_stride)
                            : Lt().create_layout(&b_, type, g.k, g.n, g.b_stride);
    });
    Then(status, [&] { return Lt().create_layout(&a_, type, g.k, g.m, g.a_stride); });
    Then(status, [&] { return Lt().create_layout(&c_, CUDA_R_32F, g.n, g.m, g.c_stride); });
    Then(status, [&] { return Choose(handle, g); });
    return status;
  }

  cublasStatus_t Run(cublasLtHandle_t handle, void* workspace, cudaStream_t stream, const DejavuCudaGemm& g) {
    const float one = 1.0f, beta = g.accumulate != 0 ? 1.0f : 0.0f;
    const cublasStatus_t status = SetBias(g.bias);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    return Lt().multiply(handle, product_, &one, g.b, b_, g.a, a_, &beta, g.c, c_, g.c, c_, &algorithm_, workspace,
                         kBlasWorkspaceBytes, stream);
  }

 private:
  template <typename Try>
  static void Then(cublasStatus_t& status, Try next) {
    if (status == CUBLAS_STATUS_SUCCESS) status = next();
  }

  template <typename T>
  cublasStatus_t Set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    return Lt().set_product(product_, attribute, &value, sizeof(value));
  }
  cublasStatus_t SetBias(const float* bias) {
    return bias != nullptr ? Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias) : CUBLAS_STATUS_SUCCESS;
  }

  cublasStatus_t Choose(cublasLtHandle_t handle, const DejavuCudaGemm& g) {
    cublasLtMatmulPreference_t preference = nullptr;
    cublasStatus_t status = Lt().create_preference(&preference);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      Then(status, [&] { return Lt().set_preference(preference, attribute, &value, sizeof(value)); });
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kBlasWorkspaceBytes});
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, AlignmentOf(g.b));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, AlignmentOf(g.a));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, AlignmentOf(g.c));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, AlignmentOf(g.c));
    cublasLtMatmulHeuristicResult_t best = {};
    int found = 0;
    Then(status, [&] { return Lt().choose(handle, product_, b_, a_, c_, c_, preference, 1, &best, &found); });
    if (preference != nullptr) Lt().destroy_preference(preference);
    if (status == CUBLAS_STATUS_SUCCESS) status = found > 0 ? best.state : CUBLAS_STATUS_NOT_SUPPORTED;
    algorithm_ = best.algo;
    return status;
  }

  cublasLtMatmulDesc_t product_ = nullptr;
  cublasLtMatrixLayout_t a_ = nullptr, b_ = nullptr, c_ = nullptr;
  cublasLtMatmulAlgo_t algorithm_ = {};
};

}  // namespace

struct Blas {
  cublasLtHandle_t handle = nullptr;
  void* workspace = nullptr;  // one of its own makes a product the same every time
  std::map<Shape, Plan> plans;

  ~Blas() {
    plans.clear();
    if (handle != nullptr) Lt().destroy(handle);
    cudaFree(workspace);
  }
};

namespace {

int BlasFailure(DejavuCudaContext& context, cublasStatus_t status, const char* tried) {
  return Conclude(context, Fail(status, "%s: %s", tried, Lt().status_string(status)));
}

int OpenBlas(DejavuCudaContext& context) {
  if (context.capturing) {
    return Fail(cudaErrorStreamCaptureUnsupported, "gemm: the first one of a context cannot be captured");
  }
  if (!Lt().library.missing().empty()) {
    return Fail(cudaErrorSharedObjectInitFailed, "gemm: cuBLASLt cannot be used: %s", Lt().library.missing().c_str());
  }
  auto blas = std::make_unique<Blas>();
  RETURN_IF_FAILED(Check(context, cudaMalloc(&blas->workspace, kBlasWorkspaceBytes), "gemm: its workspace"));
  const cublasStatus_t status = Lt().create(&blas->handle);
  if (status != CUBLAS_STATUS_SUCCESS) return BlasFailure(context, status, "gemm: opening cuBLASLt");
  context.blas = blas.release();
  return 0;
}

int GemmFailure(DejavuCudaContext& context, cublasStatus_t status, const char* tried, const DejavuCudaGemm& g) {
  char text[192];
  snprintf(text, sizeof(text), "%s a gemm of m = %lld, n = %lld, k = %lld%s%s", tried, static_cast<long long>(g.m),
           static_cast<long long>(g.n), static_cast<long long>(g.k), g.bias != nullptr ? " with bias" : "",
           g.relu != 0 ? " and ReLU" : "");
  return BlasFailure(context, status, text);
}

}  // namespace

int Gemm(DejavuCudaContext* context, const DejavuCudaGemm* gemm) {
  RETURN_IF_FAILED(Enter(*context, "gemm"));
  if (context->blas == nullptr) RETURN_IF_FAILED(OpenBlas(*context));
  Blas& blas = *context->blas;
  const Shape shape = ShapeOf(*gemm);
  auto plan = blas.plans.find(shape);
  if (plan == blas.plans.end()) {
    if (blas.plans.size() == kMostPlans) blas.plans.clear();
    plan = blas.plans.try_emplace(shape).first;
    const cublasStatus_t status = plan->second.Make(blas.handle, *gemm);
    if (status != CUBLAS_STATUS_SUCCESS) {
      blas.plans.erase(plan);
      return GemmFailure(*context, status, "choosing how to do", *gemm);
    }
  }
  const cublasStatus_t status = plan->second.Run(blas.handle, blas.workspace, context->stream, *gemm);
  if (status != CUBLAS_STATUS_SUCCESS) return GemmFailure(*context, status, "launching", *gemm);
  context->last_launch = "a gemm";
  return 0;
}

void CloseBlas(DejavuCudaContext& context) {
  delete context.blas;
  context.blas = nullptr;
}

}  // namespace dejavu::cuda
