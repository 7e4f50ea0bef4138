#include "emulated_launches.h"

#include <utility>
#include <vector>

#include "emulated_module.h"
#include "kernels/base/float16.h"
#include "kernels/base/status_macros.h"

namespace dejavu::simt {
namespace {

// Under a drawn order launches that may overlap are held back until there are one to four of them, which run together.
absl::Status RunKernel(DejavuCudaContext* context, int32_t number, Prepared prepared) {
  auto& emulation = GetEmulation();
  {
    MutexLock lock(emulation_mutex);
    if (emulation.failing_device == context->number && std::exchange(emulation.fail_next_launch, false)) {
      return context->failure =
                 absl::InternalError(absl::StrCat("kernel ", prepared.name, ": failed as the test asked for"));
    }
    ++emulation.launches[number];
    ++emulation.all_launches;
    if (emulation.order != 0) prepared.launch.order = emulation.order * 1'000'003 + emulation.all_launches;
  }
  if (!prepared.launch.overlaps) RETURN_IF_ERROR(RunHeld(context));
  context->held.push_back(std::move(prepared));
  const uint64_t order = context->held.front().launch.order;
  const size_t together = order == 0 ? 1 : 1 + (order * 0x9E3779B97F4A7C15 >> 62);
  return context->held.size() < together ? absl::OkStatus() : RunHeld(context);
}

void RunGemm(const DejavuCudaGemm& g) {
  const auto widen = [&](const void* matrix, int64_t at) {
    const uint16_t bits = static_cast<const uint16_t*>(matrix)[at];
    return g.bfloat16 ? FloatFromBFloat16(bits) : FloatFromFloat16(bits);
  };
  std::vector<float> row(g.k);
  for (int64_t i = 0; i < g.m; ++i) {
    for (int64_t k = 0; k < g.k; ++k) row[k] = widen(g.a, i * g.a_stride + k);
    for (int64_t j = 0; j < g.n; ++j) {
      float sum = g.accumulate ? g.c[i * g.c_stride + j] : 0;
      for (int64_t k = 0; k < g.k; ++k) sum += row[k] * widen(g.b, g.b_is_kn ? k * g.b_stride + j : j * g.b_stride + k);
      if (g.bias != nullptr) sum += g.bias[j];
      g.c[i * g.c_stride + j] = g.relu && sum < 0 ? 0 : sum;
    }
  }
}

}  // namespace

absl::Status LaunchKernel(DejavuCudaContext* context, const DejavuCudaLaunch* launch) {
  if (launch->kernel < 0 || launch->kernel >= static_cast<int32_t>(ModuleKernels().size())) {
    return Refuse("no kernel has the number ", launch->kernel);
  }
  const ModuleKernel& kernel = ModuleKernels()[launch->kernel];
  if (launch->params_bytes != kernel.params_bytes) {
    return Refuse("kernel ", kernel.name, " takes ", kernel.params_bytes, " bytes of parameters, not ",
                  launch->params_bytes);
  }
  if (context->capture != nullptr) ++context->capture->launches;
  const Launch how = {.grid = {launch->grid[0], launch->grid[1], launch->grid[2]},
                      .block = {launch->block[0], launch->block[1], launch->block[2]},
                      .shared_bytes = launch->shared_bytes,
                      .overlaps = launch->overlaps != 0};
  return Submit(context, [context, number = launch->kernel, prepared = kernel.prepare(launch->params, how)] {
    return RunKernel(context, number, prepared);
  });
}

absl::Status Gemm(DejavuCudaContext* context, const DejavuCudaGemm* gemm) {
  if (context->capture != nullptr && !context->has_blas) return Refuse("gemm: the first one cannot be captured");
  context->has_blas = true;
  if (context->capture != nullptr) ++context->capture->gemms;
  return Submit(context, [context, product = *gemm] {
    RETURN_IF_ERROR(RunHeld(context));
    {
      MutexLock lock(emulation_mutex);
      ++GetEmulation().gemms;
    }
    RunGemm(product);
    return absl::OkStatus();
  });
}

absl::Status KernelInfo(DejavuCudaContext*, int32_t kernel, DejavuCudaKernel* info) {
  if (kernel < 0 || kernel >= static_cast<int32_t>(ModuleKernels().size())) {
    return Refuse("no kernel has the number ", kernel);
  }
  *info = {.name = ModuleKernels()[kernel].name,
           .registers = 0,
           .shared_bytes = 0,
           .local_bytes = 0,
           .params_bytes = static_cast<int32_t>(ModuleKernels()[kernel].params_bytes),
           .binary_version = 90,
           .ptx_version = 90};
  return absl::OkStatus();
}

}  // namespace dejavu::simt
