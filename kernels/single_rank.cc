#include "kernels/communicator.h"

namespace dejavu {
namespace {

class SingleRankCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void AllReduce(Tensor) override {}
  void AllGather(Tensor y, Tensor x) override { CHECK(y.data == x.data) << "one rank gathers in place"; }
};

}  // namespace

std::unique_ptr<Communicator> SingleRank() { return std::make_unique<SingleRankCommunicator>(); }

}  // namespace dejavu
