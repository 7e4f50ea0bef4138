#include "engine/ranks/device.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/exhaustion.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "spdlog/spdlog.h"

namespace dejavu {

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
  const int all = options.threads > 0 ? options.threads : CpuCount();
  const int first = all * options.place / options.places, end = all * (options.place + 1) / options.places;
  return OrExhausted([&] {
    return CreateCpuBackend(
        {.threads = std::max(1, end - first), .pin = options.pin, .first_cpu = first, .sharers = options.sharers});
  });
}

}  // namespace dejavu
