#include "kernels/layout.h"

#include "kernels/base/status_macros.h"

namespace dejavu {

void DeviceLayout::Reserve(Tensor* view, DType dtype, int64_t rows, int64_t cols) {
  *view = Tensor{nullptr, dtype, rows, cols, cols};
  if (rows * cols == 0) return;
  regions_.push_back({view, bytes_});
  bytes_ += (view->bytes() + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
}

absl::StatusOr<Buffer> DeviceLayout::Allocate(Backend& backend) {
  ASSIGN_OR_RETURN(Buffer buffer, backend.Allocate(bytes_));
  for (const Region& r : regions_) *r.view = buffer.View(r.offset_bytes, r.view->dtype, r.view->rows, r.view->cols);
  return buffer;
}

}  // namespace dejavu
