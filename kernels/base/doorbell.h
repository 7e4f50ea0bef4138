// Doorbell: where threads sleep until somebody rings. Nothing is lost between a look and the sleep: a sleeper counts
// itself, then looks at what it waits for; who changes that looks at the count after. Both must be sequentially
// consistent, so that one of the two sees the other. A ring that nobody waits for is one load. Any thread.
#ifndef KERNELS_BASE_DOORBELL_H_
#define KERNELS_BASE_DOORBELL_H_

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>

namespace dejavu {

class Doorbell {
 public:
  // Sleeps unless `ready()`: until a ring, or the time is over, or for no reason at all.
  template <typename Ready>
  void Sleep(const Ready& ready, double limit_s = 1e6) {
    sleepers_.fetch_add(1);
    const uint32_t rings = rings_.load();
    if (!ready()) {
      const double whole = std::floor(std::min(limit_s, 1e6));
      const timespec limit{static_cast<time_t>(whole), static_cast<long>((std::min(limit_s, 1e6) - whole) * 1e9)};
      syscall(SYS_futex, &rings_, FUTEX_WAIT_PRIVATE, rings, &limit, nullptr, 0);
    }
    sleepers_.fetch_sub(1);
  }

  // How many sleep, or are about to.
  int sleepers() const { return static_cast<int>(sleepers_.load()); }

  // Wakes so many, those that have slept longest first.
  void Ring(int most = std::numeric_limits<int>::max()) {
    if (sleepers_.load() == 0) return;
    rings_.fetch_add(1);
    syscall(SYS_futex, &rings_, FUTEX_WAKE_PRIVATE, most, nullptr, nullptr, 0);
  }

 private:
  alignas(128) std::atomic<uint32_t> sleepers_{0};
  std::atomic<uint32_t> rings_{0};
};

}  // namespace dejavu

#endif  // KERNELS_BASE_DOORBELL_H_
