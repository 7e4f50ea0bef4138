// Scraper: a client of /metrics on this machine.
#ifndef TESTS_BENCH_SCRAPER_H_
#define TESTS_BENCH_SCRAPER_H_

#include <chrono>
#include <thread>

#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"

namespace dejavu {

// Asks for /metrics as often as that while it lives.
class Scraper {
 public:
  Scraper(int port, int per_second)
      : thread_([=, this] { Scrape(port, std::chrono::milliseconds(1000 / per_second)); }) {}
  ~Scraper();

  // A scrape's processor time on the server's side, which is this process, beside an idle engine.
  static double CpuMs(int port);

 private:
  void Scrape(int port, SteadyTime::duration interval);

  Mutex mutex_;
  CondVar changed_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace dejavu

#endif  // TESTS_BENCH_SCRAPER_H_
