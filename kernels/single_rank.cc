#include "kernels/communicator.h"

#include <cstring>

namespace dejavu {
namespace {

class SingleRankCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void AllReduce(Tensor) override {}
  void Broadcast(void*, int64_t) override {}
  void Gather(void* all, const void* mine, int64_t bytes) override { std::memcpy(all, mine, bytes); }
  CommunicatorStats stats() const override { return {}; }
};

}  // namespace

std::unique_ptr<Communicator> SingleRank() { return std::make_unique<SingleRankCommunicator>(); }

}  // namespace dejavu
