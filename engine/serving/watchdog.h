// Watchdog: a thread that looks whether steps end. One that takes longer than any step should will not come back. Only
// time in which the process ran counts.
#ifndef ENGINE_SERVING_WATCHDOG_H_
#define ENGINE_SERVING_WATCHDOG_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

#include "kernels/base/mutex.h"

namespace dejavu {

class Watchdog {
 public:
  // `on_hang` is called once, in the watchdog's thread, when a step has not ended within `limit_s`. 0: never. Below 0:
  // within kTimes the longest step that is to be expected, and at least kLeastS.
  Watchdog(double limit_s, std::function<void()> on_hang) : limit_s_(limit_s), on_hang_(std::move(on_hang)) {}
  static constexpr double kLeastS = 10.0, kTimes = 50.0;
  ~Watchdog() { Stop(); }

  // By the thread that owns it.
  void Start();
  void Stop();

  // Engine thread. The number of the step, from 1.
  int64_t BeginStep() { return begun_.fetch_add(1) + 1; }
  void EndStep() { ended_.fetch_add(1); }
  // What the longest step would take by now.
  void Expect(double longest_ms) { longest_ms_.store(longest_ms, std::memory_order_relaxed); }
  // The engine thread runs no more steps.
  void EndAll() { ended_.store(begun_); }

  int64_t steps_begun() const { return begun_; }

 private:
  void Watch();
  double LimitS() const;

  const double limit_s_;
  const std::function<void()> on_hang_;
  std::atomic<int64_t> begun_ = 0, ended_ = 0;
  std::atomic<double> longest_ms_ = 0.0;
  Mutex mutex_;
  CondVar stop_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_WATCHDOG_H_
