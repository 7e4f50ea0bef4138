// What this machine could do at best, now: BandwidthProbe reads memory, ArithmeticProbe multiplies and adds. Both check
// that the work was really done: a loop whose result was not used was optimised away here, and showed 2.6 times the
// truth. One thread at a time may call; the calling thread is pinned by the first measurement.
#ifndef TESTS_BENCH_PROBE_H_
#define TESTS_BENCH_PROBE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/thread_pool.h"

namespace dejavu {

// Sums 64-bit integers of a buffer much larger than the caches. The threads are pinned; each reads what it touched
// first, and when it is done helps the others, so that a processor which a neighbour slows down does not decide alone.
class BandwidthProbe {
 public:
  static constexpr int64_t kDefaultBytes = int64_t{1} << 30;

  // 0 threads: one per CPU. Takes and fills the buffer, then finds the way of reading that is the fastest here.
  // RESOURCE_EXHAUSTED without the memory.
  static absl::StatusOr<std::unique_ptr<BandwidthProbe>> Create(int threads, int64_t bytes = kDefaultBytes);
  ~BandwidthProbe();
  BandwidthProbe(const BandwidthProbe&) = delete;
  BandwidthProbe& operator=(const BandwidthProbe&) = delete;

  // GB/s (10^9 bytes) over `seconds`, in whole passes over the buffer. The default is short: the bandwidth that
  // neighbours leave changes within seconds, and what is compared with it must meet the same.
  double Measure(double seconds = 0.06);

  // The share of its time that a thread waits for the slowest where each reads `bytes` of its own and then all meet,
  // again and again for `seconds`: what a fixed division of the work costs on CPUs that are not equally fast.
  double MeasureWaiting(int64_t bytes, double seconds = 0.06);

  int threads() const { return pool_.threads(); }
  std::string Description() const;  // how it reads: "4 streams, prefetch 1024 bytes ahead"

 private:
  // How a thread reads a chunk: so many streams side by side, with or without software prefetch.
  struct Way {
    int streams = 1;
    int64_t prefetch_bytes = 0;
  };
  struct alignas(64) Slice {
    std::atomic<int64_t> next{0};
    uint64_t sum = 0;  // what its thread read in this pass, from whatever slice
    double busy_s = 0.0;
  };

  BandwidthProbe(int threads, int64_t bytes);
  void Fill();
  double MeasureWay(const Way& way, double seconds);
  void Pass(const Way& way);
  const uint8_t* data() const;  // on a huge page

  ThreadPool pool_;
  const int64_t chunks_per_slice_;
  const int64_t bytes_;
  uint8_t* data_ = nullptr;
  uint64_t expected_ = 0;  // sum of all words
  std::vector<Slice> slices_;
  Way way_;
};

// float32 fused multiply-adds that depend on nothing but registers.
class ArithmeticProbe {
 public:
  explicit ArithmeticProbe(int threads);
  // GFLOP/s of all threads together.
  double Measure();

 private:
  ThreadPool pool_;
};

}  // namespace dejavu

#endif  // TESTS_BENCH_PROBE_H_
