// DeviceLayout: gives many tensors a place each in one buffer. Reserve first, then Allocate once.
#ifndef KERNELS_LAYOUT_H_
#define KERNELS_LAYOUT_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace dejavu {

class DeviceLayout {
 public:
  // `view`, which must live until Allocate, gets its shape now and its address then. Without elements it stays empty.
  // Long rows lie a cache line further apart than they are long: a power of two between rows that are read side by side
  // would put all of them into the same sets of the caches.
  void Reserve(Tensor* view, DType dtype, int64_t rows, int64_t cols);
  int64_t bytes() const { return bytes_; }

  // Elements from one of such rows to the next, and what the distance of a place from the first one is a multiple of.
  static int64_t StrideOf(DType dtype, int64_t rows, int64_t cols);
  static constexpr int64_t kAlignmentBytes = 256;

  absl::StatusOr<Buffer> Allocate(Backend& backend);

 private:
  static constexpr int64_t kLineBytes = 64;
  static constexpr int64_t kPaddedRowBytes = 512;
  struct Region {
    Tensor* view;
    int64_t offset_bytes;
  };
  std::vector<Region> regions_;
  int64_t bytes_ = 0;
};

}  // namespace dejavu

#endif  // KERNELS_LAYOUT_H_
