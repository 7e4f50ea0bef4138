// Seconds, as flags have them, in the clock's own unit.
#ifndef LOADTEST_CLIENT_DURATION_H_
#define LOADTEST_CLIENT_DURATION_H_

#include <chrono>

#include "kernels/base/clock.h"

namespace dejavu {

inline SteadyTime::duration ToDuration(double seconds) {
  return std::chrono::duration_cast<SteadyTime::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace dejavu

#endif  // LOADTEST_CLIENT_DURATION_H_
