// OwnTime: how long somebody has waited, as far as the process ran meanwhile. A process that is stopped, be it by a
// debugger, a laptop's lid or a live migration, finds the clock far ahead: that says nothing of those it waits for. One
// thread.
#ifndef KERNELS_BASE_OWN_TIME_H_
#define KERNELS_BASE_OWN_TIME_H_

#include <algorithm>

#include "kernels/base/clock.h"

namespace dejavu {

class OwnTime {
 public:
  // Whoever waits counts at least so often; what passed between two counts beyond twice that, the process stood still.
  static constexpr double kTickS = 0.1;

  explicit OwnTime(SteadyTime now) : last_(now) {}

  // In all, in seconds.
  double Count(SteadyTime now) {
    seconds_ += std::min(std::max(0.0, Seconds(last_, now)), 2.0 * kTickS);
    last_ = now;
    return seconds_;
  }

 private:
  SteadyTime last_;
  double seconds_ = 0.0;
};

}  // namespace dejavu

#endif  // KERNELS_BASE_OWN_TIME_H_
