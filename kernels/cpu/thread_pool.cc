#include "kernels/cpu/thread_pool.h"

#include <sched.h>

#include <chrono>

#include "kernels/base/check.h"
#include "kernels/base/pause.h"

namespace dejavu {
namespace {

constexpr int kSpins = 2000;  // pauses of 10 to 40 ns

// Best effort: a CPU can leave the process's set after Cpus() was read, and then the thread runs where it may.
void RunOn(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus) CPU_SET(cpu, &set);
  sched_setaffinity(0, sizeof(set), &set);
}

void Pin(int cpu) {
  const std::vector<int>& cpus = ThreadPool::Cpus();
  if (cpu < static_cast<int>(cpus.size())) RunOn({cpus[cpu]});
}

}  // namespace

const std::vector<int>& ThreadPool::Cpus() {
  static const std::vector<int> cpus = [] {
    cpu_set_t set;
    CHECK(sched_getaffinity(0, sizeof(set), &set) == 0) << "sched_getaffinity";
    std::vector<int> result;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) result.push_back(cpu);
    }
    return result;
  }();
  return cpus;
}

ThreadPool::ThreadPool(int threads, bool pin, int first_cpu)
    : threads_(threads),
      pin_(pin),
      first_cpu_(first_cpu),
      spins_(threads <= static_cast<int>(Cpus().size()) ? kSpins : 0) {
  CHECK(threads >= 1) << threads << " threads";
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
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::RunBody(Body body, void* context) {
  if (pin_ && pinned_caller_ != std::this_thread::get_id()) {
    Pin(first_cpu_);
    pinned_caller_ = std::this_thread::get_id();
  }
  if (threads_ == 1) return body(context, 0);
  body_ = body;
  context_ = context;
  running_.store(threads_ - 1, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  body(context, 0);
  const auto start = std::chrono::steady_clock::now();
  for (uint32_t left; (left = running_.load(std::memory_order_acquire)) != 0;) AwaitChange(running_, left);
  wait_ns_ += (std::chrono::steady_clock::now() - start).count();
  ++runs_;
}

void ThreadPool::Work(int thread) {
  RunOn(Cpus());  // the creator's own pin is inherited
  if (pin_) Pin(first_cpu_ + thread);
  uint32_t epoch = 0;
  while (true) {
    epoch = AwaitChange(epoch_, epoch);
    if (stop_) return;
    body_(context_, thread);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
  }
}

uint32_t ThreadPool::AwaitChange(const std::atomic<uint32_t>& value, uint32_t old) const {
  for (int i = 0; i < spins_; ++i) {
    const uint32_t now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    Pause();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

}  // namespace dejavu
