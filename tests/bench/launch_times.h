// LaunchTimes: how long launches of a traced step take on the device that it ran on, by the device's clock. The device
// is as the step has left it: what a launch reads is there. Values change as launches are left out, but no lists,
// counts or positions do. Functions throw std::runtime_error where the device fails. One thread.
#ifndef TESTS_BENCH_LAUNCH_TIMES_H_
#define TESTS_BENCH_LAUNCH_TIMES_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "kernels/cuda/launch_reads.h"
#include "tests/bench/launch_trace.h"

namespace dejavu {

// Some launches of a step as a graph; launched one by one where the device has no memory for it. What it is made from
// must outlive it.
class Playback {
 public:
  Playback(const LaunchTrace& trace, const std::vector<TracedLaunch>& step, std::vector<size_t> places);
  ~Playback();
  Playback(const Playback&) = delete;
  Playback& operator=(const Playback&) = delete;

  void Pass();  // queues them once
  double Us();  // of a pass, over as many as take some 20 ms

 private:
  void SubmitAll();
  double Ms(int passes);

  const DejavuCudaModule& module_;
  DejavuCudaContext* const context_;
  const std::vector<TracedLaunch>& step_;
  const std::vector<size_t> places_;
  DejavuCudaGraph* graph_ = nullptr;
  int passes_ = 0;  // of a measurement; 0: not known yet
};

// What lies in the device's memory.
class DeviceState final : public cuda::LaunchState {
 public:
  explicit DeviceState(const LaunchTrace& trace) : trace_(trace) {}

  // From now on Active says how many have been added since: kernels count what they read.
  void CountFromHere() { counted_before_ = active_; }

  int32_t Selected(const void* weight, const int32_t* count) override;
  int32_t Active(const void* weight, const int32_t* count) override;
  int32_t Position(const int32_t* position) override;
  int32_t LargestRank(const cuda::SelectParams& select) override;

 private:
  int32_t Read(const int32_t* from) const;

  const LaunchTrace& trace_;
  std::map<const int32_t*, int32_t> active_, counted_before_;  // as last read
};

class LaunchTimes {
 public:
  // Of a step that the trace's device has run last. What it draws goes elsewhere from now on: otherwise every pass
  // would decode another token.
  LaunchTimes(const LaunchTrace& trace, std::vector<TracedLaunch> step);
  ~LaunchTimes();
  LaunchTimes(const LaunchTimes&) = delete;
  LaunchTimes& operator=(const LaunchTimes&) = delete;

  // The step that is measured; the device is as it leaves it.
  const std::vector<TracedLaunch>& step() const { return step_; }

  // A value for each repeat.
  struct Found {
    std::vector<double> alone_us;  // per launch, one after the other with nothing in between
    std::vector<double> chain_us;  // per launch, by how much the step is longer for it
    std::vector<double> step_us;   // with everything
    double alone_bytes = 0.0;      // per launch: activations and lists are then those of the last layer
  };
  // Of the launches at `places`.
  Found Measure(const std::vector<size_t>& places, int repeats);

 private:
  std::vector<size_t> All() const;
  double AloneBytes(const std::vector<size_t>& places);

  const LaunchTrace& trace_;
  std::vector<TracedLaunch> step_;
  void* drawn_ = nullptr;  // int32 [rows]
};

}  // namespace dejavu

#endif  // TESTS_BENCH_LAUNCH_TIMES_H_
