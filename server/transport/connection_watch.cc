// Each connection is in the epoll set once (EPOLLONESHOT): data on it makes it active, and it is armed again when it
// has been looked at. So a busy connection costs a few system calls per look, and one that is idle nothing.
#include "server/transport/connection_watch.h"

#include <malloc.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

constexpr std::chrono::milliseconds kLook(20), kMemoryLook(100);
constexpr std::chrono::seconds kSweep(1), kTrim(10), kUrgentTrim(1);
constexpr size_t kClosedAtOnce = 8;
// What any connection may hold or have sent: those below are not at fault when memory is short.
constexpr int64_t kInnocentBytes = 128 << 10;
constexpr int64_t kHysteresisBytes = 16 << 20;
constexpr int64_t kTrimBytes = 32 << 20;  // grown since the last time

int64_t Blame(Connection& connection) {
  return connection.unexplained_bytes() + connection.unread_bytes().load(std::memory_order_relaxed);
}

int Milliseconds(std::chrono::steady_clock::duration time) {
  return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(time).count());
}

}  // namespace

int64_t AnonymousBytes() {
  std::ifstream file("/proc/self/statm");
  int64_t size = 0, resident = 0, shared = 0;
  file >> size >> resident >> shared;
  return (resident - shared) * sysconf(_SC_PAGESIZE);
}

ConnectionWatch::ConnectionWatch(ConnectionTable* table, std::function<void(SteadyTime)> sweep)
    : table_(table),
      sweep_(std::move(sweep)),
      epoll_fd_(epoll_create1(EPOLL_CLOEXEC)),
      stop_fd_(eventfd(0, EFD_CLOEXEC)) {
  CHECK(epoll_fd_ >= 0 && stop_fd_ >= 0) << "epoll_create1, eventfd";
  epoll_event event = {};
  event.events = EPOLLIN;
  CHECK(epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, stop_fd_, &event) == 0) << "epoll_ctl";
  thread_ = std::thread([this] { Run(); });
}

ConnectionWatch::~ConnectionWatch() {
  CHECK(eventfd_write(stop_fd_, 1) == 0) << "eventfd_write";
  thread_.join();
  close(epoll_fd_);
  close(stop_fd_);
}

bool ConnectionWatch::Arm(const Connection& connection, int operation) const {
  epoll_event event = {};
  event.events = EPOLLIN | EPOLLONESHOT;
  event.data.ptr = const_cast<Connection*>(&connection);
  return epoll_ctl(epoll_fd_, operation, connection.fd(), &event) == 0;
}

bool ConnectionWatch::Admit(const std::string& port, const sockaddr_storage& address, int fd) {
  const std::shared_ptr<Connection> connection = table_->Admit(port, address, fd);
  if (connection == nullptr) return false;
  {
    MutexLock lock(mutex_);
    watched_[connection.get()] = connection;
  }
  if (Arm(*connection, EPOLL_CTL_ADD)) return true;
  spdlog::warn("a connection cannot be watched and is turned away");
  table_->CountTurned(Turned::kNoDescriptor);
  table_->Remove(connection);
  MutexLock lock(mutex_);
  watched_.erase(connection.get());
  return false;
}

void ConnectionWatch::BoundMemory(int64_t more_bytes) {
  const int64_t bytes = AnonymousBytes();
  trimmed_bytes_ = bytes;
  memory_bound_ = bytes + more_bytes;
}

void ConnectionWatch::Run() {
  SteadyTime next_sweep = std::chrono::steady_clock::now() + kSweep, next_memory;
  while (!stopping_) {
    SteadyTime now = std::chrono::steady_clock::now();
    const auto until_sweep = std::max<SteadyTime::duration>(next_sweep - now, {});
    Gather(Milliseconds(until_sweep));
    if (stopping_) return;
    if (!active_.empty()) {
      std::this_thread::sleep_for(kLook);  // what comes meanwhile is looked at together
      Gather(0);
    }
    now = std::chrono::steady_clock::now();
    LookAtActive(now);
    if (now >= next_memory) {
      LookAtMemory(now);
      next_memory = now + kMemoryLook;
    }
    if (now >= next_sweep) {
      sweep_(now);
      table_->ForgetPeers(now);
      next_sweep = now + kSweep;
    }
  }
}

void ConnectionWatch::Gather(int timeout_ms) {
  epoll_event events[256];
  const int count = epoll_wait(epoll_fd_, events, 256, timeout_ms);
  for (int i = 0; i < count; ++i) {
    if (events[i].data.ptr == nullptr) {
      stopping_ = true;
      return;
    }
    std::shared_ptr<Connection> connection;
    const bool gone = (events[i].events & (EPOLLHUP | EPOLLERR)) != 0;
    {
      MutexLock lock(mutex_);
      const auto found = watched_.find(static_cast<const Connection*>(events[i].data.ptr));
      if (found == watched_.end()) continue;
      connection = found->second;
      if (gone) watched_.erase(found);
    }
    if (gone) {
      epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, connection->fd(), nullptr);
      table_->Remove(connection);
    } else {
      active_.push_back(std::move(connection));
    }
  }
}

void ConnectionWatch::LookAtActive(SteadyTime now) {
  std::vector<std::shared_ptr<Connection>> again;
  for (std::shared_ptr<Connection>& connection : active_) {
    if (!connection->InputIsExplained(now, table_->limits().message_bytes)) {
      spdlog::warn("a connection is closed: it sends more than its calls explain");
      table_->Close(*connection, Closed::kUnexplained);
    } else if (connection->suspicious()) {  // also if it sends no more
      again.push_back(std::move(connection));
      continue;
    }
    Arm(*connection, EPOLL_CTL_MOD);
  }
  active_ = std::move(again);
}

void ConnectionWatch::LookAtMemory(SteadyTime now) {
  const int64_t bound = memory_bound_.load(std::memory_order_relaxed);
  if (bound == 0) return;
  const int64_t bytes = AnonymousBytes();
  if (bytes > bound) {
    if (!table_->memory_short()) {
      spdlog::warn("memory is short: more than {} MiB are held; the worst connections are closed", bound >> 20);
    }
    table_->set_memory_short(true);
    CloseWorst();
  } else if (bytes <= bound - kHysteresisBytes) {
    table_->set_memory_short(false);
  }
  // The allocator keeps what was freed.
  if (bytes < trimmed_bytes_ + kTrimBytes || now - trimmed_ < (table_->memory_short() ? kUrgentTrim : kTrim)) return;
  malloc_trim(0);
  trimmed_ = now;
  trimmed_bytes_ = AnonymousBytes();
}

void ConnectionWatch::CloseWorst() {
  std::vector<std::shared_ptr<Connection>> all = table_->All();
  const size_t worst = std::min(all.size(), kClosedAtOnce);
  std::partial_sort(all.begin(), all.begin() + static_cast<ptrdiff_t>(worst), all.end(),
                    [](const auto& a, const auto& b) { return Blame(*a) > Blame(*b); });
  for (size_t i = 0; i < worst && Blame(*all[i]) > kInnocentBytes; ++i) table_->Close(*all[i], Closed::kMemory);
}

}  // namespace dejavu
