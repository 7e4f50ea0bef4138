// A Selection (kernels/selection.h) as the host reads it.
#ifndef KERNELS_CPU_SELECTED_H_
#define KERNELS_CPU_SELECTED_H_

#include <cstdint>

#include "kernels/base/check.h"
#include "kernels/selection.h"
#include "kernels/tensor.h"

namespace dejavu::cpu {

// How many of `all` are selected. CHECKs that the list names none beyond.
inline int64_t CountOf(const Selection& selection, int64_t all) {
  if (selection.all()) return all;
  CHECK(selection.indices.dtype == DType::kInt32 && selection.count.dtype == DType::kInt32);
  const int64_t count = *selection.count.row<int32_t>(0);
  CHECK(count >= 0 && count <= selection.indices.cols && count <= all)
      << count << " selected of " << all << ", list of " << selection.indices.cols;
  if (count > 0) {
    const int32_t* indices = selection.indices.row<int32_t>(0);
    CHECK(indices[0] >= 0 && indices[count - 1] < all) << "selection to " << indices[count - 1] << " of " << all;
  }
  return count;
}

// [CountOf], ascending; nullptr: all.
inline const int32_t* ListOf(const Selection& selection) {
  return selection.all() ? nullptr : selection.indices.row<int32_t>(0);
}

// Whether bit `i` of the masks of row `row` is set.
inline bool Selected(const Tensor& masks, int64_t row, int64_t i) {
  return (static_cast<uint32_t>(masks.row<int32_t>(row)[i / 32]) >> (i % 32) & 1) != 0;
}

// Whether row `row` computes only what it selected itself.
inline bool IsStrict(const Selection& selection, int64_t row) {
  return !selection.masks.empty() && (selection.strict.empty() || selection.strict.row<int32_t>(0)[row] != 0);
}

}  // namespace dejavu::cpu

#endif  // KERNELS_CPU_SELECTED_H_
