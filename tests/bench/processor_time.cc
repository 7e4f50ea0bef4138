#include "tests/bench/processor_time.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "kernels/base/check.h"

namespace dejavu {
namespace {

// As Linux numbers the clock of a thread's processor time (include/linux/posix-timers.h, CPUCLOCK_PERTHREAD and
// CPUCLOCK_SCHED); C libraries make the number of threads that they know.
clockid_t ThreadClock(int thread) { return ~thread * 8 + 6; }

}  // namespace

double ProcessorMs(clockid_t clock) {
  timespec time;
  CHECK(clock_gettime(clock, &time) == 0);
  return 1e3 * static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_nsec);
}

ProcessorTimeBeside::ProcessorTimeBeside() {
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    const int thread = std::atoi(task.path().filename().c_str());
    if (thread != gettid()) others_.push_back(ThreadClock(thread));
  }
}

double ProcessorTimeBeside::Ms() const {
  double ms = ProcessorMs(CLOCK_PROCESS_CPUTIME_ID);
  for (const clockid_t other : others_) ms -= ProcessorMs(other);
  return ms;
}

}  // namespace dejavu
