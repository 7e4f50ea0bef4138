// Lifecycle: in which phase of its life the server is. Phases only move forward. Any thread.
#ifndef SERVER_RPC_LIFECYCLE_H_
#define SERVER_RPC_LIFECYCLE_H_

#include <array>
#include <atomic>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "dejavu/v1/generation.pb.h"

namespace dejavu {

enum class Phase {
  kLoading,
  kWarming,  // all weights are there; first steps show how long steps take
  kServing,
  kLeaving,   // says that it is not ready, but still accepts (the linger of a drain)
  kDraining,  // accepts nothing new; what runs goes on
  kFailed,    // the engine broke; only a restart helps
  kStopped,   // the last words are being sent
};

// What clients, metrics and people are told of a phase, from the first state to the last.
inline constexpr std::array kServerStates = {v1::SERVER_STATE_LOADING, v1::SERVER_STATE_WARMING,
                                             v1::SERVER_STATE_SERVING, v1::SERVER_STATE_DRAINING,
                                             v1::SERVER_STATE_FAILED};
v1::ServerState StateOf(Phase phase);
std::string Name(v1::ServerState state);  // "loading"

class Lifecycle {
 public:
  // `listener` runs after every change, in the thread that made it. To be called before other threads know the object.
  void AddListener(std::function<void(Phase)> listener) { listeners_.push_back(std::move(listener)); }

  Phase phase() const { return phase_.load(std::memory_order_acquire); }

  // Goes on to `next`; a phase that lies behind is ignored.
  void Advance(Phase next) {
    Phase current = phase();
    do {
      if (next <= current) return;
    } while (!phase_.compare_exchange_weak(current, next, std::memory_order_acq_rel));
    for (const auto& listener : listeners_) listener(next);
  }

 private:
  std::atomic<Phase> phase_{Phase::kLoading};
  std::vector<std::function<void(Phase)>> listeners_;  // constant once shared
};

}  // namespace dejavu

#endif  // SERVER_RPC_LIFECYCLE_H_
