#include "engine/serving/watchdog.h"

#include <algorithm>
#include <chrono>

#include "kernels/base/clock.h"
#include "kernels/base/own_time.h"
#include "spdlog/spdlog.h"

namespace dejavu {

void Watchdog::Start() {
  if (limit_s_ != 0.0) thread_ = std::thread([this] { Watch(); });
}

void Watchdog::Stop() {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    stop_.NotifyAll();
  }
  thread_.join();
}

double Watchdog::LimitS() const {
  return limit_s_ > 0.0 ? limit_s_ : std::max(kLeastS, kTimes * longest_ms_.load(std::memory_order_relaxed) / 1e3);
}

void Watchdog::Watch() {
  const SteadyTime::duration tick = Lasting(std::min(OwnTime::kTickS, LimitS() / 8.0));
  OwnTime running(std::chrono::steady_clock::now());
  int64_t seen = -1;
  MutexLock lock(mutex_);
  while (!stopping_) {
    const SteadyTime now = std::chrono::steady_clock::now();
    const int64_t begun = begun_;
    if (begun != seen || ended_ == begun) {
      seen = begun;
      running = OwnTime(now);
    }
    if (running.Count(now) >= LimitS()) {
      spdlog::critical("step {} has not ended within {} s; the engine is given up", begun, LimitS());
      on_hang_();
      return;
    }
    stop_.WaitUntil(mutex_, now + tick);
  }
}

}  // namespace dejavu
