// The real module as the tests' one: a table that counts what is launched, as Emulation has it, in front of the loaded
// one. Contexts may have threads of their own. And the program's main, which says what is missing where there is no
// module or no GPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <map>
#include <string>
#include <utility>

#include "kernels/base/mutex.h"
#include "kernels/cuda/load_module.h"
#include "kernels/cuda/params.h"
#include "module_under_test.h"

namespace dejavu::simt {
namespace {

const DejavuCudaModule* real = nullptr;  // since main
thread_local std::string failure;        // as a test asked for; the real module knows nothing of it

struct Counts {
  std::vector<int64_t> launches = std::vector<int64_t>(cuda::kKernels);
  int64_t all_launches = 0, gemms = 0, all_reduces = 0, asides = 0;
};
struct Device {
  int32_t number = 0;
  bool capturing = false;
  Counts captured;
  int32_t last_event = -1;
};
Mutex mutex;  // for these and for Emulation's counts
std::map<DejavuCudaContext*, Device> devices;
std::map<DejavuCudaGraph*, Counts> graphs;

void Add(const Counts& counts) {
  Emulation& emulation = GetEmulation();
  for (size_t i = 0; i < counts.launches.size(); ++i) emulation.launches[i] += counts.launches[i];
  emulation.all_launches += counts.all_launches;
  emulation.gemms += counts.gemms;
  emulation.all_reduces += counts.all_reduces;
}

bool Fails(const Device& device, const char* what) {
  Emulation& emulation = GetEmulation();
  if (device.number != emulation.failing_device || !std::exchange(emulation.fail_next_launch, false)) return false;
  failure = std::string(what) + ": failed as the test asked for";
  return true;
}

const char* Error() { return failure.empty() ? real->error() : failure.c_str(); }

int Open(int32_t number, DejavuCudaContext** context, DejavuCudaDevice* info) {
  failure.clear();
  const int result = real->open(number, context, info);
  if (result != 0) return result;
  MutexLock lock(mutex);
  devices[*context].number = number;
  return 0;
}

void Close(DejavuCudaContext* context) {
  {
    MutexLock lock(mutex);
    devices.erase(context);
  }
  real->close(context);
}

int LaunchCounted(DejavuCudaContext* context, const DejavuCudaLaunch* launch) {
  {
    MutexLock lock(mutex);
    Device& device = devices[context];
    if (!device.capturing && Fails(device, ModuleKernels()[launch->kernel].name)) return 1;
    if (device.capturing) {
      ++device.captured.launches[launch->kernel];
      ++device.captured.all_launches;
    } else {
      ++GetEmulation().launches[launch->kernel];
      ++GetEmulation().all_launches;
    }
  }
  return real->launch(context, launch);
}

int Gemm(DejavuCudaContext* context, const DejavuCudaGemm* gemm) {
  {
    MutexLock lock(mutex);
    Device& device = devices[context];
    ++(device.capturing ? device.captured.gemms : GetEmulation().gemms);
  }
  return real->gemm(context, gemm);
}

int GroupId(char* id) {
  if (!GetEmulation().refuse_groups) return real->group_id(id);
  failure = "groups of GPUs need NCCL, which the test took away";
  return 1;
}

int AllReduce(DejavuCudaContext* context, float* data, int64_t count, int32_t aside) {
  {
    MutexLock lock(mutex);
    Device& device = devices[context];
    ++(device.capturing ? device.captured.all_reduces : GetEmulation().all_reduces);
    if (device.capturing) device.captured.asides += aside;
  }
  return real->all_reduce(context, data, count, aside);
}

int BeginCapture(DejavuCudaContext* context) {
  {
    MutexLock lock(mutex);
    devices[context].captured = {};
    devices[context].capturing = true;
  }
  return real->begin_capture(context);
}

int EndCapture(DejavuCudaContext* context, DejavuCudaGraph** graph) {
  const int result = real->end_capture(context, graph);
  MutexLock lock(mutex);
  Device& device = devices[context];
  device.capturing = false;
  if (result != 0) return result;
  GetEmulation().captured_launches = device.captured.all_launches;
  GetEmulation().captured_gemms = device.captured.gemms;
  GetEmulation().captured_all_reduces = device.captured.all_reduces;
  GetEmulation().captured_asides = device.captured.asides;
  graphs[*graph] = device.captured;
  return 0;
}

int Stamp(DejavuCudaContext* context, int32_t event) {
  {
    MutexLock lock(mutex);
    devices[context].last_event = event;
  }
  return real->stamp(context, event);
}

int Wait(DejavuCudaContext* context, int32_t event) {
  {
    MutexLock lock(mutex);
    GetEmulation().waits_behind += event != devices[context].last_event;
  }
  return real->wait(context, event);
}

int Replay(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  {
    MutexLock lock(mutex);
    if (Fails(devices[context], "a graph")) return 1;
    Add(graphs[graph]);
    ++GetEmulation().replays;
  }
  return real->replay(context, graph);
}

void FreeGraph(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  {
    MutexLock lock(mutex);
    graphs.erase(graph);
  }
  real->free_graph(context, graph);
}

// Why the tests cannot run; empty: they can.
std::string WhatIsMissing() {
  const absl::StatusOr<const DejavuCudaModule*> module = cuda::LoadModule();
  if (!module.ok()) return std::string(module.status().message());
  real = *module;
  DejavuCudaContext* context = nullptr;
  DejavuCudaDevice device;
  if (real->open(0, &context, &device) != 0) return real->error();
  real->close(context);
  std::printf("%s, compute capability %d.%d\n", device.name, device.compute_major, device.compute_minor);
  return "";
}

}  // namespace

const DejavuCudaModule* ModuleUnderTest() {
  static const DejavuCudaModule module = [] {
    DejavuCudaModule counting = *real;
    counting.error = Error;
    counting.open = Open;
    counting.close = Close;
    counting.launch = LaunchCounted;
    counting.gemm = Gemm;
    counting.begin_capture = BeginCapture;
    counting.end_capture = EndCapture;
    counting.replay = Replay;
    counting.stamp = Stamp;
    counting.wait = Wait;
    counting.free_graph = FreeGraph;
    counting.group_id = GroupId;
    counting.all_reduce = AllReduce;
    return counting;
  }();
  return &module;
}

bool HasDevices(int count) {
  DejavuCudaContext* context = nullptr;
  DejavuCudaDevice device;
  if (real->open(count - 1, &context, &device) != 0) return false;
  real->close(context);
  return true;
}

std::span<const ModuleKernel> ModuleKernels() {
#define DEJAVU_KERNEL_OF_DEVICE(name, params) {#name, sizeof(cuda::params), nullptr},
  static const std::vector<ModuleKernel> kernels = {DEJAVU_CUDA_KERNELS(DEJAVU_KERNEL_OF_DEVICE)};
#undef DEJAVU_KERNEL_OF_DEVICE
  return kernels;
}

Emulation& GetEmulation() {
  static Emulation emulation;
  return emulation;
}

void Emulation::ResetCounts() {
  launches.assign(ModuleKernels().size(), 0);
  all_launches = gemms = all_reduces = replays = waits_behind = 0;
}

}  // namespace dejavu::simt

int main(int argc, char** argv) {
  testing::InitGoogleMock(&argc, argv);
  const std::string missing = dejavu::simt::WhatIsMissing();
  if (!missing.empty()) {
    std::fprintf(stderr, "gpu_test: %s\n", missing.c_str());
    return 1;
  }
  return RUN_ALL_TESTS();
}
