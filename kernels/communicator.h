// Communicator: the ranks that hold slices of one model. The model calls it unconditionally; a group of one is the
// identity. Calls are queued on the backend in order and every rank must make the same calls. One thread per rank.
#ifndef KERNELS_COMMUNICATOR_H_
#define KERNELS_COMMUNICATOR_H_

#include <memory>

#include "kernels/tensor.h"

namespace dejavu {

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // x = sum of x over the ranks, in rank order, in place. float32.
  virtual void AllReduce(Tensor x) = 0;

  // y [size * x.rows, x.cols] = the ranks' x, one after the other. With one rank y may be x.
  virtual void AllGather(Tensor y, Tensor x) = 0;
};

// The group of one.
std::unique_ptr<Communicator> SingleRank();

}  // namespace dejavu

#endif  // KERNELS_COMMUNICATOR_H_
