// Selection: which heads or neurons an op computes. The list and its count live on the device, so a step never waits
// for the host to learn them. The default selects everything: dense is the special case, not another code path.
#ifndef KERNELS_SELECTION_H_
#define KERNELS_SELECTION_H_

#include "kernels/tensor.h"

namespace dejavu {

struct Selection {
  Tensor indices;  // int32 [1, capacity], strictly ascending; empty: everything is selected
  Tensor count;    // int32 [1, 1], how many of `indices` are valid

  bool all() const { return indices.empty(); }
};

}  // namespace dejavu

#endif  // KERNELS_SELECTION_H_
