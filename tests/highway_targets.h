// Runs a test under each instruction set that this machine has and the kernels were compiled for.
#ifndef TESTS_HIGHWAY_TARGETS_H_
#define TESTS_HIGHWAY_TARGETS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "hwy/targets.h"

namespace dejavu {

struct HighwayTarget {
  uint32_t bit;
  std::string name;
};

inline std::vector<HighwayTarget> HighwayTargets() {
  std::vector<HighwayTarget> targets;
  for (uint32_t bit : hwy::SupportedAndGeneratedTargets()) targets.push_back({bit, hwy::TargetName(bit)});
  return targets;
}

// While it lives, the kernels run on that target. Not while any backend is working.
class ForceHighwayTarget {
 public:
  explicit ForceHighwayTarget(const HighwayTarget& target) { Choose(target.bit); }
  ~ForceHighwayTarget() { Choose(0); }
  ForceHighwayTarget(const ForceHighwayTarget&) = delete;
  ForceHighwayTarget& operator=(const ForceHighwayTarget&) = delete;

 private:
  static void Choose(uint32_t bit) {
    hwy::SetSupportedTargetsForTest(bit);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

}  // namespace dejavu

#endif  // TESTS_HIGHWAY_TARGETS_H_
