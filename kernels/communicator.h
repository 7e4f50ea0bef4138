// Communicator: the ranks that hold slices of one model. The model calls it unconditionally; a group of one is the
// identity. Every rank must make the same calls in the same order. One thread per rank.
//
// A peer that does not come within the rank's limit, or has failed, makes the call throw PeerLost, which names the
// call, the rank that waited and the limit: like a lost device, it has no status to be returned in.
#ifndef KERNELS_COMMUNICATOR_H_
#define KERNELS_COMMUNICATOR_H_

#include <cstdint>
#include <memory>
#include <stdexcept>

#include "absl/functional/function_ref.h"
#include "kernels/tensor.h"

namespace dejavu {

// Since the communicator was made.
struct CommunicatorStats {
  int64_t all_reduces = 0;
  int64_t all_reduce_ns = 0;  // the calling thread's, waiting for the others included
};

// What a call throws whose peer does not come.
class PeerLost : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // x = sum of x over the ranks, in place, to the same bits on every rank and in every run. float32; what lies
  // between its rows may be added up, too. Queued on the rank's backend where that has a queue.
  virtual void AllReduce(Tensor x) = 0;
  // The same, and `work`, which queues ops that touch neither x nor the group: a device does both at once.
  virtual void AllReduceBeside(Tensor x, absl::FunctionRef<void()> work) {
    AllReduce(x);
    work();
  }

  // Host memory. Everyone ends with rank 0's bytes. A follower may wait here for long: its processor goes to others
  // after a while.
  virtual void Broadcast(void* data, int64_t bytes) = 0;

  // Host memory. On rank 0 `all` [size][bytes] receives everyone's `mine`, in the order of ranks; elsewhere it may be
  // nullptr.
  virtual void Gather(void* all, const void* mine, int64_t bytes) = 0;

  // From now on this rank waits for others so long and no longer, in seconds; infinite: for ever.
  virtual void SetLimit(double /*seconds*/) {}

  virtual CommunicatorStats stats() const = 0;
};

// The group of one.
std::unique_ptr<Communicator> SingleRank();

}  // namespace dejavu

#endif  // KERNELS_COMMUNICATOR_H_
