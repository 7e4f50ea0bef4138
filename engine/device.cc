#include "engine/device.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "spdlog/spdlog.h"

namespace dejavu {

absl::StatusOr<std::unique_ptr<Backend>> CreateDevice(const std::string& device, int threads, bool pin) {
  if (device != "cpu" && device != "cuda" && device != "auto") {
    return absl::InvalidArgumentError(absl::StrCat("device is '", device, "'; it must be auto, cpu or cuda"));
  }
  if (device != "cpu") {
    absl::StatusOr<std::unique_ptr<Backend>> cuda = CreateCudaBackend(0);
    if (cuda.ok()) return cuda;
    const std::string why(cuda.status().message());
    if (device == "cuda") return absl::Status(cuda.status().code(), absl::StrCat("device cuda: ", why));
    spdlog::info("device auto: the CPU computes: {}", why);
  }
  return CreateCpuBackend({threads, pin});
}

}  // namespace dejavu
