// Lifecycle: in which phase of its life the server is. Phases only move forward. Any thread.
#ifndef SERVER_RPC_LIFECYCLE_H_
#define SERVER_RPC_LIFECYCLE_H_

#include <atomic>
#include <functional>
#include <utility>
#include <vector>

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
