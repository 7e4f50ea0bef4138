// LiveRequests: the generation and score calls that are under way, by request id. Any thread.
#ifndef SERVER_RPC_LIVE_REQUESTS_H_
#define SERVER_RPC_LIVE_REQUESTS_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/request.h"
#include "kernels/base/mutex.h"

namespace dejavu {

class LiveRequest {
 public:
  virtual ~LiveRequest() = default;
  // Ends the request at the engine's next step; its call ends with `reason`. Called under the registry's lock.
  virtual void Stop(const absl::Status& reason) = 0;
};

class LiveRequests {
 public:
  // ALREADY_EXISTS while another request of that id lives. Until Remove the request can be stopped; until Done, which
  // comes after it, its call is still sending.
  absl::Status Add(const std::string& id, const std::string& tenant, LiveRequest* request);
  void Remove(const std::string& id);
  void Done();

  // False: no such request. With `tenant`, PERMISSION_DENIED where it is another one's.
  absl::StatusOr<bool> Stop(const std::string& id, const std::optional<std::string>& tenant,
                            const absl::Status& reason);
  void StopAll(const absl::Status& reason);

  // Of those that can be stopped, at most `limit`.
  std::vector<std::string> Ids(size_t limit);

  // No call is left.
  bool idle();
  // False when `deadline` passed first.
  bool WaitIdle(SteadyTime deadline);

 private:
  struct Entry {
    std::string tenant;
    LiveRequest* request;
  };

  Mutex mutex_;
  CondVar idle_;
  absl::flat_hash_map<std::string, Entry> requests_ ABSL_GUARDED_BY(mutex_);
  int calls_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace dejavu

#endif  // SERVER_RPC_LIVE_REQUESTS_H_
