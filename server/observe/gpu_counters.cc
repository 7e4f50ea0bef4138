#include "server/observe/gpu_counters.h"

#include <dlfcn.h>

#include <cstdint>

namespace dejavu {
namespace {

// The part of NVML's interface that is used here, which NVIDIA keeps stable. Its header comes only with the CUDA
// toolkit.
using NvmlDevice = struct nvmlDevice_st*;
struct NvmlMemory {
  unsigned long long total, free, used;
};
struct NvmlUtilization {
  unsigned int gpu, memory;
};
constexpr int kUncorrected = 1, kSinceDriverLoad = 0;

struct Nvml {
  int (*count)(unsigned int*) = nullptr;
  int (*device)(unsigned int, NvmlDevice*) = nullptr;
  int (*memory)(NvmlDevice, NvmlMemory*) = nullptr;
  int (*utilization)(NvmlDevice, NvmlUtilization*) = nullptr;
  int (*power)(NvmlDevice, unsigned int*) = nullptr;
  int (*energy)(NvmlDevice, unsigned long long*) = nullptr;
  int (*ecc)(NvmlDevice, int, int, unsigned long long*) = nullptr;
  bool loaded = false;
};

template <typename Function>
bool Find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

Nvml Load() {
  Nvml nvml;
  void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  int (*init)() = nullptr;
  nvml.loaded = library != nullptr && Find(library, "nvmlInit_v2", &init) && init() == 0 &&
                Find(library, "nvmlDeviceGetCount_v2", &nvml.count) &&
                Find(library, "nvmlDeviceGetHandleByIndex_v2", &nvml.device) &&
                Find(library, "nvmlDeviceGetMemoryInfo", &nvml.memory) &&
                Find(library, "nvmlDeviceGetUtilizationRates", &nvml.utilization) &&
                Find(library, "nvmlDeviceGetPowerUsage", &nvml.power) &&
                Find(library, "nvmlDeviceGetTotalEnergyConsumption", &nvml.energy) &&
                Find(library, "nvmlDeviceGetTotalEccErrors", &nvml.ecc);
  return nvml;
}

}  // namespace

std::vector<GpuCounters> ReadGpuCounters() {
  static const Nvml nvml = Load();
  std::vector<GpuCounters> gpus;
  unsigned int count = 0;
  if (!nvml.loaded || nvml.count(&count) != 0) return gpus;
  for (unsigned int i = 0; i < count; ++i) {
    NvmlDevice device = nullptr;
    if (nvml.device(i, &device) != 0) continue;
    GpuCounters& gpu = gpus.emplace_back();
    gpu.index = static_cast<int>(i);
    // What a GPU does not report, such as the energy of an old one, stays 0.
    NvmlMemory memory = {};
    NvmlUtilization utilization = {};
    unsigned int milliwatts = 0;
    unsigned long long millijoules = 0, errors = 0;
    if (nvml.memory(device, &memory) == 0) gpu.memory_used_bytes = static_cast<double>(memory.used);
    if (nvml.utilization(device, &utilization) == 0) gpu.utilization = utilization.gpu / 100.0;
    if (nvml.power(device, &milliwatts) == 0) gpu.power_watts = milliwatts / 1e3;
    if (nvml.energy(device, &millijoules) == 0) gpu.energy_joules = static_cast<double>(millijoules) / 1e3;
    if (nvml.ecc(device, kUncorrected, kSinceDriverLoad, &errors) == 0) gpu.ecc_errors = static_cast<double>(errors);
  }
  return gpus;
}

}  // namespace dejavu
