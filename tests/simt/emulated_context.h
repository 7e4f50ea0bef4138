// What the emulated module's functions work on: a context and its graphs. Work is done at once, but what the host may
// not rely on before it has waited is withheld.
#ifndef TESTS_SIMT_EMULATED_CONTEXT_H_
#define TESTS_SIMT_EMULATED_CONTEXT_H_

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "emulated_group.h"
#include "kernels/base/mutex.h"
#include "kernels/cuda/abi.h"
#include "simt.h"

namespace dejavu::simt {

using Allocations = std::map<const char*, int64_t>;  // bytes by begin
using Work = std::function<absl::Status()>;

}  // namespace dejavu::simt

struct DejavuCudaGraph {
  std::vector<dejavu::simt::Work> work;
  int64_t launches = 0, gemms = 0, all_reduces = 0, asides = 0;
};

struct DejavuCudaContext {
  dejavu::simt::Allocations device, pinned;
  int64_t device_bytes = 0;
  absl::Status failure;                      // of a kernel: whatever comes after it fails
  std::vector<dejavu::simt::Prepared> held;  // the last launches, perhaps
  std::unique_ptr<DejavuCudaGraph> capture;
  bool has_blas = false;  // opened by the first gemm, which must not be captured
  int32_t number = 0;     // of the device
  std::shared_ptr<dejavu::simt::EmulatedGroup> group;
  int32_t rank = 0;
  float* aside = nullptr;  // what waits for join_all_reduce
  int64_t aside_count = 0;
  double group_limit_s = INFINITY;
  int64_t graphs_in_group = 0;  // that hold all-reduces
  struct Event {
    std::chrono::steady_clock::time_point time;
    size_t fetched = 0, uploaded = 0;  // rows before it, since the beginning
  };
  Event events[66];
  int32_t last_event = -1;

  // Until the host waits: rows on their way to pinned memory, and what pinned memory held when it was uploaded.
  struct Row {
    char* host;
    std::vector<char> bytes;
  };
  std::deque<Row> fetched, uploaded;
  size_t fetched_before = 0, uploaded_before = 0;  // rows that the host has waited for
};

namespace dejavu::simt {

extern Mutex emulation_mutex;  // for Emulation's counts and fail_next_launch, where contexts have threads of their own

absl::Status Refuse(const auto&... message) { return absl::FailedPreconditionError(absl::StrCat(message...)); }

// Launches that were held back (emulated_launches.cc) come before anything but a launch.
absl::Status RunHeld(DejavuCudaContext* context);

// What the host finds once it has waited for so many rows, or for all.
absl::Status Arrive(DejavuCudaContext* context, size_t fetched, size_t uploaded);
absl::Status Wait(DejavuCudaContext* context);

// Calls that wait for the device, or allocate, have no place in a graph, nor while an all-reduce is aside.
absl::Status CheckNothingAside(const DejavuCudaContext* context, const char* what);
absl::Status CheckNoCapture(const DejavuCudaContext* context, const char* what);

// Does the work, or keeps it for the graph that is captured.
absl::Status Submit(DejavuCudaContext* context, Work work);

}  // namespace dejavu::simt

#endif  // TESTS_SIMT_EMULATED_CONTEXT_H_
