// The launches of a step by kind: the same kernel for the same use over the same grid. Plain data; any thread.
#ifndef TESTS_BENCH_LAUNCH_KINDS_H_
#define TESTS_BENCH_LAUNCH_KINDS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "engine/model/opt_weights.h"
#include "kernels/cuda/launch_reads.h"
#include "tests/bench/launch_trace.h"

namespace dejavu {

// What a weight is in the model, by its address on the device.
struct WeightUse {
  const char* name = "";
  int32_t layer = 0;
};
using WeightUses = std::map<const void*, WeightUse>;
WeightUses UsesOf(const OptWeights& weights);

struct LaunchKind {
  std::string name;            // "LinearBF16 up"
  DejavuCudaLaunch shape;      // of one; no parameters
  std::vector<size_t> places;  // in the step
  cuda::LaunchReads reads;     // of all together
};

// In the order of their first launches.
std::vector<LaunchKind> KindsOf(const std::vector<TracedLaunch>& step, const WeightUses& uses,
                                cuda::LaunchState& state);

// Of those launches.
cuda::LaunchReads ReadsOf(const std::vector<TracedLaunch>& step, const std::vector<size_t>& places,
                          cuda::LaunchState& state);

}  // namespace dejavu

#endif  // TESTS_BENCH_LAUNCH_KINDS_H_
