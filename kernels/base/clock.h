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

// Longer than any process lives, and yet so short that a point of time can be moved by it: now + kForever does not
// overflow, on either clock.
inline constexpr SteadyTime::duration kForever = std::chrono::hours(24 * 365 * 100);

// So many seconds as a duration, at most kForever, either way. Not a number: nothing.
inline SteadyTime::duration Lasting(double seconds) {
  const double most = std::chrono::duration<double>(kForever).count();
  if (seconds >= most) return kForever;
  if (seconds <= -most) return -kForever;
  if (seconds != seconds) return SteadyTime::duration::zero();
  return std::chrono::duration_cast<SteadyTime::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace dejavu

#endif  // KERNELS_BASE_CLOCK_H_
