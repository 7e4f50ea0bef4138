// Selection: which heads or neurons an op computes. The list and its count live on the device, so a step never waits
// for the host to learn them. The default selects everything: dense is the special case, not another code path.
#ifndef KERNELS_SELECTION_H_
#define KERNELS_SELECTION_H_

#include "kernels/tensor.h"

namespace dejavu {

struct Selection {
  Tensor indices;  // int32 [1, capacity], strictly ascending: what any row selected; empty: everything is selected
  Tensor count;    // int32 [1, 1], how many of `indices` are valid

  // What each row selected, where rows differ. The index list is their union.
  Tensor masks{};   // int32 [rows, words]: bit i % 32 of word i / 32 of a row; empty: every row selected the whole list
  Tensor strict{};  // int32 [1, rows]: 1: the row computes what it selected itself, 0: the whole list; empty: all are 1

  bool all() const { return indices.empty(); }
};

}  // namespace dejavu

#endif  // KERNELS_SELECTION_H_
