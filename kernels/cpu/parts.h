// How an op is cut into parts for the threads. Work goes out in chunks that whichever thread is free takes; what a
// chunk computes does not depend on where it was cut (kernels/cpu/kernels.h). Work too small to be worth waking threads
// for stays on the calling thread. One thread at a time.
#ifndef KERNELS_CPU_PARTS_H_
#define KERNELS_CPU_PARTS_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/round.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/thread_pool.h"

namespace dejavu::cpu {

// Multiply-adds or elements, a few microseconds: about what waking threads costs.
inline constexpr int64_t kSmallWork = 16 << 10;

class Parts {
 public:
  // As ThreadPool.
  Parts(int threads, bool pin, int first_cpu)
      : pool_(threads, pin, first_cpu),
        scratch_(static_cast<float*>(std::aligned_alloc(64, threads * kScratchBytes)), std::free) {
    CHECK(scratch_ != nullptr);
  }

  const ThreadPool& pool() const { return pool_; }
  int threads() const { return pool_.threads(); }

  // kScratchBytes of a thread's own.
  float* Scratch(int thread) const { return scratch_.get() + thread * (kScratchBytes / sizeof(float)); }

  // ThreadPool::ParallelFor: function(first, last, thread).
  template <typename Function>
  void For(int64_t items, int64_t grain, Function&& function) {
    pool_.ParallelFor(items, grain, std::forward<Function>(function));
  }

  // function(first, last) over ranges of rows of `cols` elements.
  template <typename Function>
  void ForRows(int64_t rows, int64_t cols, const Function& function) {
    pool_.ParallelFor(rows, DivideUp(kSmallWork, std::max<int64_t>(1, cols)),
                      [&](int64_t first, int64_t last, int) { function(first, last); });
  }

  // Outputs to a chunk: several chunks for each thread, but none so small that handing it out costs more than it.
  int64_t OutputGrain(int64_t outputs, int64_t work_per_output) const {
    const int64_t worth_it = DivideUp(kSmallWork, std::max<int64_t>(1, work_per_output));
    return RoundUp(std::max(worth_it, outputs / (pool_.threads() * kChunksPerThread)), kLeastOutputs);
  }

 private:
  static constexpr int64_t kChunksPerThread = 32;
  static constexpr int64_t kLeastOutputs = 24;  // of a part, or there is too little in it to fetch ahead

  ThreadPool pool_;
  const std::unique_ptr<float, decltype(&std::free)> scratch_;  // [threads, kScratchBytes]
};

}  // namespace dejavu::cpu

#endif  // KERNELS_CPU_PARTS_H_
