// LaunchTrace: a CUDA module in front of another one that keeps what a step launches. Who makes a backend over it sees
// no difference. One thread, and one trace of a process at a time.
#ifndef TESTS_BENCH_LAUNCH_TRACE_H_
#define TESTS_BENCH_LAUNCH_TRACE_H_

#include <map>
#include <optional>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/cuda/abi.h"

namespace dejavu {

// A launch, or a product that the module has from a library.
struct TracedLaunch {
  DejavuCudaLaunch launch = {};  // its `params` are those below
  std::vector<char> params;
  std::optional<DejavuCudaGemm> gemm;
};

class LaunchTrace {
 public:
  // `traced` must outlive the trace, and the trace whatever was opened through its module.
  explicit LaunchTrace(const DejavuCudaModule* traced);
  ~LaunchTrace();
  LaunchTrace(const LaunchTrace&) = delete;
  LaunchTrace& operator=(const LaunchTrace&) = delete;

  const DejavuCudaModule* module() const { return &module_; }

  // What `step` launches, in order; of a graph that it replays, what that holds.
  std::vector<TracedLaunch> Of(absl::FunctionRef<void()> step);

  // What `module` opened last: launches of a trace run on it.
  const DejavuCudaModule& traced() const { return traced_; }
  DejavuCudaContext* context() const { return context_; }
  const DejavuCudaDevice& device() const { return device_; }

 private:
  static int Open(int32_t device, DejavuCudaContext** context, DejavuCudaDevice* info);
  static int Launch(DejavuCudaContext* context, const DejavuCudaLaunch* launch);
  static int Gemm(DejavuCudaContext* context, const DejavuCudaGemm* gemm);
  static int BeginCapture(DejavuCudaContext* context);
  static int EndCapture(DejavuCudaContext* context, DejavuCudaGraph** graph);
  static int Replay(DejavuCudaContext* context, DejavuCudaGraph* graph);
  static void FreeGraph(DejavuCudaContext* context, DejavuCudaGraph* graph);

  void Keep(TracedLaunch launch);

  static LaunchTrace* current_;  // a module's functions know of nothing else

  const DejavuCudaModule& traced_;
  DejavuCudaModule module_;
  DejavuCudaContext* context_ = nullptr;
  DejavuCudaDevice device_ = {};
  bool tracing_ = false, capturing_ = false;
  std::vector<TracedLaunch> step_, capture_;
  std::map<DejavuCudaGraph*, std::vector<TracedLaunch>> graphs_;
};

// Queues it once more. As the module's functions.
int Submit(const DejavuCudaModule& module, DejavuCudaContext* context, const TracedLaunch& launch);

}  // namespace dejavu

#endif  // TESTS_BENCH_LAUNCH_TRACE_H_
