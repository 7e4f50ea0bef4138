// What the forms of a group on the host share: the one order in which the ranks' values are added, and views as runs of
// contiguous memory. So a sum over N ranks has the same bits whatever carries it.
#ifndef KERNELS_GROUP_ORDERED_SUM_H_
#define KERNELS_GROUP_ORDERED_SUM_H_

#include <algorithm>
#include <cstdint>

#include "absl/types/span.h"
#include "kernels/tensor.h"

namespace dejavu {

// sum[i] = parts[0][i] + parts[1][i] + ..., i < count. `sum` may be one of the parts.
void SumInOrder(absl::Span<const float* const> parts, int64_t count, float* sum);

// run(data, offset, length) over the contiguous pieces of the float32 elements first ... first + count of x, counted
// row by row; `offset` is from `first`.
template <typename Run>
void ForEachRun(const Tensor& x, int64_t first, int64_t count, Run&& run) {
  if (x.stride == x.cols || x.rows == 1) {
    run(x.row<float>(0) + first, int64_t{0}, count);
    return;
  }
  for (int64_t done = 0; done < count;) {
    const int64_t col = (first + done) % x.cols;
    const int64_t length = std::min(count - done, x.cols - col);
    run(x.row<float>((first + done) / x.cols) + col, done, length);
    done += length;
  }
}

}  // namespace dejavu

#endif  // KERNELS_GROUP_ORDERED_SUM_H_
