// The real module as the tests' one: a table that counts what is launched, as Emulation has it, in front of the loaded
// one. And the program's main, which says what is missing where there is no module or no GPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <map>
#include <string>
#include <utility>

#include "kernels/cuda/load_module.h"
#include "kernels/cuda/params.h"
#include "module_under_test.h"

namespace dejavu::simt {
namespace {

const DejavuCudaModule* real = nullptr;  // since main
std::string failure;                     // as a test asked for; the real module knows nothing of it

struct Counts {
  std::vector<int64_t> launches = std::vector<int64_t>(cuda::kKernels);
  int64_t all_launches = 0, gemms = 0;
};
std::map<DejavuCudaGraph*, Counts> graphs;
Counts captured;
bool capturing = false;
int32_t last_event = -1;

void Add(const Counts& counts) {
  Emulation& emulation = GetEmulation();
  for (size_t i = 0; i < counts.launches.size(); ++i) emulation.launches[i] += counts.launches[i];
  emulation.all_launches += counts.all_launches;
  emulation.gemms += counts.gemms;
}

bool Fails(const char* what) {
  if (!std::exchange(GetEmulation().fail_next_launch, false)) return false;
  failure = std::string(what) + ": failed as the test asked for";
  return true;
}

const char* Error() { return failure.empty() ? real->error() : failure.c_str(); }

int Open(int32_t device, DejavuCudaContext** context, DejavuCudaDevice* info) {
  failure.clear();
  return real->open(device, context, info);
}

int LaunchCounted(DejavuCudaContext* context, const DejavuCudaLaunch* launch) {
  if (!capturing && Fails(ModuleKernels()[launch->kernel].name)) return 1;
  Counts one;
  one.launches[launch->kernel] = one.all_launches = 1;
  if (!capturing) {
    Add(one);
  } else {
    ++captured.launches[launch->kernel];
    ++captured.all_launches;
  }
  return real->launch(context, launch);
}

int Gemm(DejavuCudaContext* context, const DejavuCudaGemm* gemm) {
  ++(capturing ? captured.gemms : GetEmulation().gemms);
  return real->gemm(context, gemm);
}

int BeginCapture(DejavuCudaContext* context) {
  captured = {};
  capturing = true;
  return real->begin_capture(context);
}

int EndCapture(DejavuCudaContext* context, DejavuCudaGraph** graph) {
  capturing = false;
  const int result = real->end_capture(context, graph);
  if (result != 0) return result;
  GetEmulation().captured_launches = captured.all_launches;
  GetEmulation().captured_gemms = captured.gemms;
  graphs[*graph] = captured;
  return 0;
}

int Stamp(DejavuCudaContext* context, int32_t event) {
  last_event = event;
  return real->stamp(context, event);
}

int Wait(DejavuCudaContext* context, int32_t event) {
  GetEmulation().waits_behind += event != last_event;
  return real->wait(context, event);
}

int Replay(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  if (Fails("a graph")) return 1;
  Add(graphs[graph]);
  return real->replay(context, graph);
}

void FreeGraph(DejavuCudaContext* context, DejavuCudaGraph* graph) {
  graphs.erase(graph);
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
    counting.launch = LaunchCounted;
    counting.gemm = Gemm;
    counting.begin_capture = BeginCapture;
    counting.end_capture = EndCapture;
    counting.replay = Replay;
    counting.stamp = Stamp;
    counting.wait = Wait;
    counting.free_graph = FreeGraph;
    return counting;
  }();
  return &module;
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
  all_launches = gemms = 0;
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
