// ConnectionWatch: a thread that looks after the connections. It notices which have gone, closes those that send more
// than their calls explain, closes the worst ones while the process holds more memory than it should, and calls
// `sweep`, once a second, for calls that last too long. Any thread.
#ifndef SERVER_TRANSPORT_CONNECTION_WATCH_H_
#define SERVER_TRANSPORT_CONNECTION_WATCH_H_

#include <sys/socket.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"
#include "server/transport/connection_table.h"

namespace dejavu {

class ConnectionWatch {
 public:
  // The table must outlive the object.
  explicit ConnectionWatch(ConnectionTable* table, std::function<void(SteadyTime)> sweep);
  ~ConnectionWatch();

  ConnectionTable* table() { return table_; }

  // As ConnectionTable::Admit; false: refused.
  bool Admit(const std::string& port, const sockaddr_storage& address, int fd);

  // From now on the process shall hold no more than `more_bytes` beyond what it holds now, files that it has mapped
  // apart.
  void BoundMemory(int64_t more_bytes);
  int64_t memory_bound_bytes() const { return memory_bound_.load(std::memory_order_relaxed); }  // 0: none yet

 private:
  void Run();
  void Gather(int timeout_ms);
  void LookAtActive(SteadyTime now);
  void LookAtMemory(SteadyTime now);
  void CloseWorst();
  bool Arm(const Connection& connection, int operation) const;

  ConnectionTable* const table_;
  const std::function<void(SteadyTime)> sweep_;
  std::atomic<int64_t> memory_bound_{0};
  std::atomic<int64_t> trimmed_bytes_{0};  // held after the allocator gave back what it could
  int epoll_fd_ = -1, stop_fd_ = -1;

  Mutex mutex_;
  absl::flat_hash_map<const Connection*, std::shared_ptr<Connection>> watched_ ABSL_GUARDED_BY(mutex_);

  // The thread's.
  std::vector<std::shared_ptr<Connection>> active_;  // have sent something since they were looked at
  SteadyTime trimmed_;
  bool stopping_ = false;
  std::thread thread_;
};

// Memory of this process that belongs to no file.
int64_t AnonymousBytes();

}  // namespace dejavu

#endif  // SERVER_TRANSPORT_CONNECTION_WATCH_H_
