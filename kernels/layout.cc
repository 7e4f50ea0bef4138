#include "kernels/layout.h"

#include "kernels/base/status_macros.h"

namespace dejavu {

int64_t DeviceLayout::StrideOf(DType dtype, int64_t rows, int64_t cols) {
  const int64_t row_bytes = cols * SizeOf(dtype);
  const bool pad = rows > 1 && row_bytes % kLineBytes == 0 && row_bytes >= kPaddedRowBytes;
  return pad ? cols + kLineBytes / SizeOf(dtype) : cols;
}

void DeviceLayout::Reserve(Tensor* view, DType dtype, int64_t rows, int64_t cols) {
  *view = Tensor{nullptr, dtype, rows, cols, StrideOf(dtype, rows, cols)};
  if (rows * cols == 0) return;
  regions_.push_back({view, bytes_});
  bytes_ += (rows * view->stride * SizeOf(dtype) + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
}

absl::StatusOr<Buffer> DeviceLayout::Allocate(Backend& backend) {
  ASSIGN_OR_RETURN(Buffer buffer, backend.Allocate(bytes_));
  for (const Region& r : regions_) {
    *r.view = buffer.View(r.offset_bytes, r.view->dtype, r.view->rows, r.view->stride).Cols(0, r.view->cols);
  }
  return buffer;
}

}  // namespace dejavu
