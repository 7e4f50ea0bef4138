// OpenCalls: the calls that gRPC holds, so that those can be ended whose client keeps them waiting. Any thread.
#ifndef SERVER_RPC_OPEN_CALLS_H_
#define SERVER_RPC_OPEN_CALLS_H_

#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"
#include "server/options.h"

namespace dejavu {

class Rpc;

struct CallTimeouts {
  explicit CallTimeouts(const ServerOptions& options);

  SteadyTime::duration request, stall;  // duration::max(): none
};

class OpenCalls {
 public:
  explicit OpenCalls(const CallTimeouts& timeouts) : timeouts_(timeouts) {}

  void Add(const std::shared_ptr<Rpc>& rpc);
  void Remove(const Rpc* rpc);

  // Ends those that have waited too long for their client.
  void Sweep(SteadyTime now);
  // Ends those that wait for a request.
  void EndReading(const absl::Status& status);

 private:
  std::vector<std::shared_ptr<Rpc>> All() const;

  const CallTimeouts timeouts_;

  mutable Mutex mutex_;
  absl::flat_hash_map<const Rpc*, std::weak_ptr<Rpc>> calls_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace dejavu

#endif  // SERVER_RPC_OPEN_CALLS_H_
