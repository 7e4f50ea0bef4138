#include "engine/serving/watchdog.h"

#include <chrono>

#include "kernels/base/clock.h"
#include "spdlog/spdlog.h"

namespace dejavu {

void Watchdog::Start() {
  if (limit_s_ > 0.0) thread_ = std::thread([this] { Watch(); });
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

void Watchdog::Watch() {
  const auto limit = std::chrono::duration_cast<SteadyTime::duration>(std::chrono::duration<double>(limit_s_));
  SteadyTime since = std::chrono::steady_clock::now();
  int64_t seen = -1;
  MutexLock lock(mutex_);
  while (!stopping_) {
    const SteadyTime now = std::chrono::steady_clock::now();
    const int64_t begun = begun_;
    if (begun != seen || ended_ == begun) {
      seen = begun;
      since = now;
    }
    if (now - since >= limit) {
      spdlog::critical("step {} has not ended within {} s; the engine is given up", begun, limit_s_);
      on_hang_();
      return;
    }
    stop_.WaitUntil(mutex_, now + limit / 8);
  }
}

}  // namespace dejavu
