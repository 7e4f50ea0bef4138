// LiveRequests: the generation and score calls that are under way, by owner and request id. Any thread.
#ifndef SERVER_RPC_LIVE_REQUESTS_H_
#define SERVER_RPC_LIVE_REQUESTS_H_

#include <functional>
#include <optional>
#include <string>
#include <utility>
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

// Ids of different owners have nothing to do with each other. The owner is the tenant where tokens say who that is, and
// nobody in particular (empty) otherwise.
struct RequestKey {
  std::string owner, id;
  bool operator==(const RequestKey&) const = default;
  template <typename State>
  friend State AbslHashValue(State state, const RequestKey& key) {
    return State::combine(std::move(state), key.owner, key.id);
  }
};

class LiveRequests {
 public:
  // A call is under way from Enter to Done.
  void Enter();
  void Done();

  // ALREADY_EXISTS while another request of that key lives; `freed` is called once when it does no more, and must only
  // wake somebody. Until Remove the request can be stopped. `tenant` is for operators to see.
  absl::Status Add(const RequestKey& key, const std::string& tenant, LiveRequest* request, std::function<void()> freed);
  // The key is free, and `freed` of that request is forgotten. Once more, or without Add, it does nothing.
  void Remove(const RequestKey& key, const LiveRequest* request);

  // False: no such request.
  bool Stop(const RequestKey& key, const absl::Status& reason);
  // Of any owner. FAILED_PRECONDITION where several tenants have one of that id, and `tenant` does not say whose.
  absl::StatusOr<bool> StopOfAny(const std::string& id, const std::optional<std::string>& tenant,
                                 const absl::Status& reason);
  // And wakes those that wait for a key.
  void StopAll(const absl::Status& reason);

  struct Live {
    std::string tenant, id;
  };
  // Of those that can be stopped, at most `limit`.
  std::vector<Live> List(size_t limit);

  // No call is left.
  bool idle();
  // False when `deadline` passed first.
  bool WaitIdle(SteadyTime deadline);

 private:
  struct Waiter {
    const LiveRequest* request;
    std::function<void()> freed;
  };
  struct Entry {
    std::string tenant;
    LiveRequest* request;
    std::vector<Waiter> waiters;
  };

  Mutex mutex_;
  CondVar idle_;
  absl::flat_hash_map<RequestKey, Entry> requests_ ABSL_GUARDED_BY(mutex_);
  int calls_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace dejavu

#endif  // SERVER_RPC_LIVE_REQUESTS_H_
