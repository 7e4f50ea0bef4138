// ThreadPool: a fixed set of threads that run one function together and return to waiting. The calling thread is one of
// them (thread 0). Between runs they spin for some tens of microseconds, the gap between two ops, and then sleep; with
// more threads than CPUs they sleep at once. One thread at a time may call; a run allocates nothing and costs
// microseconds.
#ifndef KERNELS_CPU_THREAD_POOL_H_
#define KERNELS_CPU_THREAD_POOL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace dejavu {

class ThreadPool {
 public:
  // The CPUs that this process could use when a pool was first made, ascending.
  static const std::vector<int>& Cpus();

  // `pin` gives thread i the i-th of Cpus() after `first_cpu`, as far as they reach. That includes the calling thread,
  // pinned by its first run: threads which it starts later inherit the pin, so call from a thread that starts none.
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
    using F = std::remove_reference_t<Function>;
    RunBody([](void* context, int thread) { (*static_cast<F*>(context))(thread); }, &function);
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
    Run([&](int thread) {
      for (int64_t first; (first = next_.fetch_add(grain, std::memory_order_relaxed)) < items;) {
        function(first, std::min(first + grain, items), thread);
      }
    });
  }

 private:
  using Body = void (*)(void* context, int thread);

  void RunBody(Body body, void* context);
  void Work(int thread);
  void Stop();
  uint32_t AwaitChange(const std::atomic<uint32_t>& value, uint32_t old) const;

  // Constant after construction.
  const int threads_;
  const bool pin_;
  const int first_cpu_;
  const int spins_;
  std::vector<std::thread> workers_;

  // The calling thread only.
  int64_t runs_ = 0, wait_ns_ = 0;
  std::thread::id pinned_caller_;

  // Written by the caller before it raises epoch_, read by the workers after.
  Body body_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;

  alignas(64) std::atomic<uint32_t> epoch_{0};    // one more for each run
  alignas(64) std::atomic<uint32_t> running_{0};  // workers that have not finished this run
  alignas(64) std::atomic<int64_t> next_{0};      // first item that no thread has taken
};

}  // namespace dejavu

#endif  // KERNELS_CPU_THREAD_POOL_H_
