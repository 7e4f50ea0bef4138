// WorkPool: a few threads of low priority for what takes long in a call: reading and tokenising a large request,
// writing a large reply. So neither gRPC's threads nor the writer's keep small calls waiting. What is smallest goes
// first. Any thread.
#ifndef SERVER_RPC_WORK_POOL_H_
#define SERVER_RPC_WORK_POOL_H_

#include <cstdint>
#include <functional>
#include <map>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "kernels/base/mutex.h"

namespace dejavu {

class WorkPool {
 public:
  // `max_waiting_bytes`: of requests.
  WorkPool(int threads, int64_t max_waiting_bytes);
  // Stop.
  ~WorkPool();

  // Of a request of so many bytes. RESOURCE_EXHAUSTED where too many bytes wait already.
  absl::Status PostRequest(int64_t bytes, std::function<void()> work);
  // Of a reply, which has been paid for: it is never refused.
  void PostReply(int64_t bytes, std::function<void()> work);

  // What waits is dropped; what runs ends.
  void Stop();

  // Of requests, now and since the start.
  int64_t waiting_bytes() const;
  int64_t requests() const;
  int64_t refused() const;

 private:
  struct Work {
    std::function<void()> run;
    int64_t request_bytes = 0;  // 0: a reply
  };

  void Run();
  void Push(int64_t bytes, Work work) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int64_t max_waiting_bytes_;

  mutable Mutex mutex_;
  CondVar changed_;
  std::multimap<int64_t, Work> waiting_ ABSL_GUARDED_BY(mutex_);  // by size; equal ones in their order
  int64_t waiting_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t requests_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t refused_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace dejavu

#endif  // SERVER_RPC_WORK_POOL_H_
