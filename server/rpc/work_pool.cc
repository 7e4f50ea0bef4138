#include "server/rpc/work_pool.h"

#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

constexpr int kNice = 10;  // the engine's threads are at 0

}  // namespace

WorkPool::WorkPool(int threads, int64_t max_waiting_bytes) : max_waiting_bytes_(max_waiting_bytes) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
}

WorkPool::~WorkPool() { Stop(); }

absl::Status WorkPool::PostRequest(int64_t bytes, std::function<void()> work) {
  MutexLock lock(mutex_);
  ++requests_;
  if (waiting_bytes_ + bytes > max_waiting_bytes_) {
    ++refused_;
    return QuotaExceeded("transport.max_waiting_mib",
                         absl::StrCat("a request of ", bytes, " bytes cannot wait beside ", waiting_bytes_,
                                      " bytes of others; at most ", max_waiting_bytes_, " may"),
                         std::chrono::seconds(1));
  }
  Push(bytes, {std::move(work), bytes});
  return absl::OkStatus();
}

void WorkPool::PostReply(int64_t bytes, std::function<void()> work) {
  MutexLock lock(mutex_);
  Push(bytes, {std::move(work), 0});
}

void WorkPool::Push(int64_t bytes, Work work) {
  waiting_bytes_ += work.request_bytes;
  waiting_.emplace(bytes, std::move(work));
  changed_.NotifyOne();
}

void WorkPool::Stop() {
  std::multimap<int64_t, Work> dropped;  // what they hold may end calls: not under the lock
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    dropped.swap(waiting_);
    waiting_bytes_ = 0;
    changed_.NotifyAll();
  }
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void WorkPool::Run() {
  setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), kNice);
  while (true) {
    Work work;
    {
      MutexLock lock(mutex_);
      while (waiting_.empty() && !stopping_) changed_.Wait(mutex_);
      if (stopping_) return;
      work = std::move(waiting_.begin()->second);
      waiting_.erase(waiting_.begin());
      waiting_bytes_ -= work.request_bytes;
    }
    work.run();
  }
}

int64_t WorkPool::waiting_bytes() const {
  MutexLock lock(mutex_);
  return waiting_bytes_;
}

int64_t WorkPool::requests() const {
  MutexLock lock(mutex_);
  return requests_;
}

int64_t WorkPool::refused() const {
  MutexLock lock(mutex_);
  return refused_;
}

}  // namespace dejavu
