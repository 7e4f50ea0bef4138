// Emulated contexts that add up, each in a thread of its own: in the order of ranks, and as NCCL does, only when all
// have come.
#ifndef TESTS_SIMT_EMULATED_GROUP_H_
#define TESTS_SIMT_EMULATED_GROUP_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/base/mutex.h"

namespace dejavu::simt {

class EmulatedGroup {
 public:
  // The group that somebody may join yet by this id.
  static std::shared_ptr<EmulatedGroup> Of(const std::string& id);

  // Returns when all have joined, or fails after so many seconds.
  absl::Status Join(int32_t device, int32_t rank, int32_t size, double seconds);

  // data [count], in place; DEADLINE_EXCEEDED when some rank does not come.
  absl::Status AllReduce(int32_t rank, float* data, int64_t count, double seconds);

 private:
  absl::Status Wait(double seconds, absl::FunctionRef<bool()> come);

  Mutex mutex_;  // guards the rest
  CondVar changed_;
  std::set<int32_t> devices_;
  std::vector<std::vector<float>> parts_;  // [rank] of the all-reduce under way
  size_t come_ = 0;                        // to it
  int64_t done_ = 0;
  std::vector<float> sum_;  // of the last one
};

}  // namespace dejavu::simt

#endif  // TESTS_SIMT_EMULATED_GROUP_H_
