#include "kernels/tensor.h"

namespace dejavu {

const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kInt8:
      return "int8";
  }
  return "?";
}

Tensor Tensor::Rows(int64_t first, int64_t count) const {
  CHECK(first >= 0 && count >= 0 && first + count <= rows) << first << " + " << count << " of " << rows << " rows";
  Tensor view = *this;
  view.data = static_cast<char*>(data) + first * stride * SizeOf(dtype);
  view.rows = count;
  return view;
}

Tensor Tensor::Cols(int64_t first, int64_t count) const {
  CHECK(first >= 0 && count >= 0 && first + count <= cols) << first << " + " << count << " of " << cols << " columns";
  Tensor view = *this;
  view.data = static_cast<char*>(data) + first * SizeOf(dtype);
  view.cols = count;
  return view;
}

Tensor Buffer::View(int64_t offset_bytes, DType dtype, int64_t rows, int64_t cols) const {
  CHECK(offset_bytes >= 0 && offset_bytes + rows * cols * SizeOf(dtype) <= bytes_)
      << "view of " << rows << " x " << cols << " at " << offset_bytes << " in " << bytes_ << " bytes";
  return Tensor{static_cast<char*>(data_) + offset_bytes, dtype, rows, cols, cols};
}

}  // namespace dejavu
