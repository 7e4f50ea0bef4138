#include "kernels/cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>

#include "kernels/base/check.h"
#include "kernels/base/pause.h"
#include "kernels/base/processors.h"

namespace dejavu {
namespace {

constexpr int kSpins = 2000;  // pauses of 10 to 40 ns

// Of call_: whether it is open, whether everybody must come, how many workers are in it, its number. A worker comes in
// by adding itself to an open call, so the caller that has closed it knows whom it waits for.
constexpr uint64_t kOpen = 1, kAll = 2, kWorker = 4;
constexpr int kNumberShift = 16;
constexpr int kMostThreads = 1 << (kNumberShift - 2);
constexpr uint64_t kWorkers = (uint64_t{1} << kNumberShift) - kWorker;

// Best effort: a CPU can leave the process's set after ProcessCpus() was read, and then the thread runs where it may.
void RunOn(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus) CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof(set), &set);
}

void Pin(int cpu) {
  const std::vector<int>& cpus = ProcessCpus();
  if (cpu < static_cast<int>(cpus.size())) RunOn({cpus[cpu]});
}

}  // namespace

ThreadPool::ThreadPool(int threads, bool pin, int first_cpu)
    : threads_(threads),
      pin_(pin),
      first_cpu_(first_cpu),
      most_helpers_(std::min(threads, static_cast<int>(ProcessCpus().size())) - 1) {
  CHECK(threads >= 1 && threads <= kMostThreads) << threads << " threads";
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { Work(i); });
  } catch (...) {  // the system has no more threads
    Stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { Stop(); }

void ThreadPool::Stop() {
  stop_ = true;
  opened_.Ring();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::CallBody(Body body, void* context, int helpers, bool all) {
  if (pin_ && pinned_caller_ != std::this_thread::get_id()) {
    Pin(first_cpu_);
    pinned_caller_ = std::this_thread::get_id();
  }
  if (threads_ == 1) return body(context, 0);
  body_ = body;
  context_ = context;
  call_ = (++calls_ << kNumberShift) | (all ? kAll | kOpen : kOpen);
  const int awake = threads_ - 1 - opened_.sleepers();
  if (helpers > awake) opened_.Ring(helpers - awake);
  body(context, 0);
  const auto start = std::chrono::steady_clock::now();
  if (all) AwaitWorkers([this] { return missing_.load(std::memory_order_acquire) == 0; });
  call_.fetch_sub(kOpen);
  AwaitWorkers([this] { return (call_.load() & kWorkers) == 0; });
  wait_ns_ += (std::chrono::steady_clock::now() - start).count();
  ++runs_;
}

void ThreadPool::Work(int thread) {
  RunOn(ProcessCpus());  // the creator's own pin is inherited
  if (pin_) Pin(first_cpu_ + thread);
  for (uint64_t number = 0; (number = ComeIn(number)) != 0;) {
    body_(context_, thread);
    call_.fetch_sub(kWorker);
    left_.Ring();
  }
}

// To a worker that was in the call of that number last.
bool ThreadPool::Welcome(uint64_t call, uint64_t last) const {
  if ((call & kOpen) == 0 || call >> kNumberShift == last) return false;
  return (call & kAll) != 0 || static_cast<int>((call & kWorkers) / kWorker) < most_helpers_;
}

// Returns the number of the call that the worker has come into, or 0 when the pool ends.
uint64_t ThreadPool::ComeIn(uint64_t last) {
  while (true) {
    for (int i = 0; i < kSpins; ++i) {
      uint64_t call = call_.load(std::memory_order_acquire);
      while (Welcome(call, last)) {
        if (call_.compare_exchange_weak(call, call + kWorker)) return call >> kNumberShift;
      }
      Pause();
    }
    if (stop_) return 0;
    opened_.Sleep([&] { return Welcome(call_.load(), last) || stop_; });
  }
}

template <typename Done>
void ThreadPool::AwaitWorkers(const Done& done) {
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return;
    Pause();
  }
  while (!done()) left_.Sleep(done);
}

}  // namespace dejavu
