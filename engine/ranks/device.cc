#include "engine/ranks/device.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/exhaustion.h"
#include "kernels/base/processors.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

// This place's part of the CPUs. Threads that leave some of them free are not pinned: another process would put its own
// on the same ones, while the system moves them to those that are idle. Nor are those of more ranks than CPUs.
CpuBackendOptions PartOf(const DeviceOptions& options) {
  const auto part = [&](int all) {
    const int first = all * options.place / options.places;
    return std::pair(first, std::max(1, all * (options.place + 1) / options.places - first));
  };
  const Processors processors = FindProcessors();
  const auto [first_cpu, own_cpus] = part(processors.allowed);
  CpuBackendOptions cpu = {.first_cpu = first_cpu, .sharers = options.sharers};
  if (options.threads > 0) {
    std::tie(cpu.first_cpu, cpu.threads) = part(options.threads);
    cpu.threads_because = "as configured";
  } else {
    const Threads threads = WorthRunning(processors, own_cpus, options.sharers);
    cpu.threads = threads.count;
    cpu.threads_because = threads.because;
  }
  const CpuQuota& quota = processors.quota;
  for (const std::string& problem : quota.problems) spdlog::warn("CPU quota ignored: {}", problem);
  if (!quota.file.empty()) spdlog::info("CPU quota: {:g} processors, says {}", quota.cpus, quota.file);
  cpu.pin = options.pin && cpu.threads >= own_cpus && options.places <= processors.allowed;
  return cpu;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateDevice(const DeviceOptions& options) {
  const std::string& device = options.device;
  if (device != "cpu" && device != "cuda" && device != "auto") {
    return absl::InvalidArgumentError(absl::StrCat("device is '", device, "'; it must be auto, cpu or cuda"));
  }
  if (device != "cpu") {
    absl::StatusOr<std::unique_ptr<Backend>> cuda = CreateCudaBackend(options.gpu);
    if (cuda.ok()) return cuda;
    const std::string why(cuda.status().message());
    if (device == "cuda") return absl::Status(cuda.status().code(), absl::StrCat("device cuda: ", why));
    spdlog::info("device auto: the CPU computes: {}", why);
  }
  const CpuBackendOptions cpu = PartOf(options);
  return OrExhausted([&] { return CreateCpuBackend(cpu); });
}

}  // namespace dejavu
