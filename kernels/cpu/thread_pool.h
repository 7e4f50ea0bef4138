// ThreadPool: a fixed set of threads that work on one call together. The calling thread is one of them (thread 0).
// Between calls they spin for some tens of microseconds, the gap between two ops, and then sleep. A range is worked on
// by whichever threads are there, as many at once as there are CPUs: nobody waits for one that has no processor, unless
// it lost it amidst a chunk. One thread at a time may call; a call allocates nothing and costs microseconds.
#ifndef KERNELS_CPU_THREAD_POOL_H_
#define KERNELS_CPU_THREAD_POOL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

#include "kernels/base/doorbell.h"

namespace dejavu {

class ThreadPool {
 public:
  // `pin` gives thread i the i-th of ProcessCpus() after `first_cpu`, as far as they reach. That includes the calling
  // thread, pinned by its first run: threads which it starts later inherit the pin, so call from a thread that starts
  // none.
  ThreadPool(int threads, bool pin, int first_cpu = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Of the calling thread: how often it ran something together with the others, and how long it then waited for them.
  int64_t runs() const { return runs_; }
  int64_t wait_ns() const { return wait_ns_; }

  // function(thread) on every thread; returns when all have returned.
  template <typename Function>
  void Run(Function&& function) {
    missing_.store(threads_ - 1, std::memory_order_relaxed);
    auto count_down = [&](int thread) {
      function(thread);
      if (thread != 0) missing_.fetch_sub(1, std::memory_order_release);
    };
    Call(count_down, threads_ - 1, /*all=*/true);
  }

  // function(first, last, thread) over chunks of 0 ... items that start at multiples of `grain`, each taken by
  // whichever thread is free. A range that fits in one chunk, or a pool of one thread, is a single plain call.
  template <typename Function>
  void ParallelFor(int64_t items, int64_t grain, Function&& function) {
    if (items <= 0) return;
    if (items <= grain || threads_ == 1) {
      function(int64_t{0}, items, 0);
      return;
    }
    next_.store(0, std::memory_order_relaxed);
    auto take = [&](int thread) {
      for (int64_t first; (first = next_.fetch_add(grain, std::memory_order_relaxed)) < items;) {
        function(first, std::min(first + grain, items), thread);
      }
    };
    Call(take, static_cast<int>(std::min<int64_t>(most_helpers_, (items - 1) / grain)), /*all=*/false);
  }

 private:
  using Body = void (*)(void* context, int thread);

  // body(context, thread) on this thread and, until it is done here, on those that come; up to `helpers` are woken for
  // it. With `all` until nobody is missing.
  void CallBody(Body body, void* context, int helpers, bool all);
  template <typename Function>
  void Call(Function&& function, int helpers, bool all) {
    using F = std::remove_reference_t<Function>;
    CallBody([](void* context, int thread) { (*static_cast<F*>(context))(thread); }, &function, helpers, all);
  }

  void Work(int thread);
  bool Welcome(uint64_t call, uint64_t last) const;
  uint64_t ComeIn(uint64_t last);
  template <typename Done>
  void AwaitWorkers(const Done& done);
  void Stop();

  // Constant after construction.
  const int threads_;
  const bool pin_;
  const int first_cpu_;
  const int most_helpers_;  // that work on a range at once
  std::vector<std::thread> workers_;

  // The calling thread only.
  int64_t runs_ = 0, wait_ns_ = 0;
  uint64_t calls_ = 0;
  std::thread::id pinned_caller_;

  // Written by the caller before it opens a call, read by the workers that have come in.
  Body body_ = nullptr;
  void* context_ = nullptr;

  // The number of the call, how many workers are in it, and whether others may still come in; see the .cc file.
  alignas(128) std::atomic<uint64_t> call_{0};
  std::atomic<bool> stop_{false};
  Doorbell opened_;                            // rung when a call begins, or the pool ends
  Doorbell left_;                              // rung when a worker has left a call
  alignas(128) std::atomic<int64_t> next_{0};  // first item that no thread has taken
  std::atomic<int> missing_{0};                // workers that have not finished this run
};

}  // namespace dejavu

#endif  // KERNELS_CPU_THREAD_POOL_H_
