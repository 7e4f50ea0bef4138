// Time as this project counts it: points of the steady clock, and what lies between two of them.
#ifndef KERNELS_BASE_CLOCK_H_
#define KERNELS_BASE_CLOCK_H_

#include <chrono>

namespace dejavu {

using SteadyTime = std::chrono::steady_clock::time_point;

inline double Seconds(SteadyTime from, SteadyTime to) { return std::chrono::duration<double>(to - from).count(); }
inline double Milliseconds(SteadyTime from, SteadyTime to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}
inline double SecondsSince(SteadyTime start) { return Seconds(start, std::chrono::steady_clock::now()); }
inline double MillisecondsSince(SteadyTime start) { return Milliseconds(start, std::chrono::steady_clock::now()); }

}  // namespace dejavu

#endif  // KERNELS_BASE_CLOCK_H_
