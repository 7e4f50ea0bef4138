// The CUDA module (kernels/cuda/abi.h) over the emulator, for a made-up device: CudaBackend cannot tell it from the
// real one. Device memory lies on the heap in exact sizes, where AddressSanitizer sees overruns, use after free and
// leaks. Work is done at once, but what the host may not rely on before it has waited is withheld: a fetch fills its
// target with NaN until then, and the source of an upload from pinned memory is checked for changes. As with CUDA, a
// kernel that fails leaves a context in which everything else fails, too. Each context may have a thread of its own; in
// a group they add up in the order of ranks, and a rank that waits for another does so where an all-reduce is queued,
// or its graph replayed.
#ifndef TESTS_SIMT_EMULATED_MODULE_H_
#define TESTS_SIMT_EMULATED_MODULE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/abi.h"
#include "simt.h"

namespace dejavu::simt {

const DejavuCudaModule* EmulatedModule();

// A kernel of the module, by its number.
struct ModuleKernel {
  const char* name;
  size_t params_bytes;
  Prepared (*prepare)(const void* params, const Launch& launch);
};

// Defined once per program: emulated_kernels.cc has those of the CUDA backend.
std::span<const ModuleKernel> ModuleKernels();

// X(name, params) makes an element of that list from a list like DEJAVU_CUDA_KERNELS.
#define DEJAVU_SIMT_MODULE_KERNEL(name, params)                                     \
  {#name, sizeof(params), [](const void* p, const ::dejavu::simt::Launch& launch) { \
     return ::dejavu::simt::Prepare(name, *static_cast<const params*>(p), launch);  \
   }},

// Of all contexts; tests change and read it between calls.
struct Emulation {
  uint64_t order = 0;  // 0: natural; else every launch has an order of its own, drawn from this
  bool fail_next_launch = false;
  int failing_device = 0;
  bool refuse_graphs = false;  // the device has no memory for them
  bool refuse_groups = false;  // there is no NCCL
  int devices = 1;
  int64_t memory_bytes = int64_t{4} << 30;  // of each

  // Since the start or ResetCounts; what a replay runs counts like the rest.
  std::vector<int64_t> launches = std::vector<int64_t>(ModuleKernels().size());  // by kernel number
  int64_t all_launches = 0, gemms = 0, all_reduces = 0;
  int64_t uploads = 0, fetches = 0, fetched_bytes = 0;
  int64_t replays = 0;       // of graphs
  int64_t waits_behind = 0;  // for an event that was not the last one: the queue went on meanwhile

  int64_t captured_launches = 0, captured_gemms = 0, captured_all_reduces = 0,
          captured_asides = 0;  // of the last graph

  void ResetCounts();
};
Emulation& GetEmulation();

}  // namespace dejavu::simt

#endif  // TESTS_SIMT_EMULATED_MODULE_H_
