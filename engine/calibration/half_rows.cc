#include "engine/calibration/half_rows.h"

#include "kernels/base/float16.h"

namespace dejavu {

void HalfRows::Reserve(int64_t rows, int64_t cols) {
  cols_ = cols;
  bits_.reserve(static_cast<size_t>(rows * cols));
}

void HalfRows::Append(const float* row) {
  for (int64_t c = 0; c < cols_; ++c) bits_.push_back(Float16FromFloat(row[c]));
}

void HalfRows::Copy(int64_t row, float* to) const {
  const uint16_t* from = &bits_[static_cast<size_t>(row * cols_)];
  for (int64_t c = 0; c < cols_; ++c) to[c] = FloatFromFloat16(from[c]);
}

}  // namespace dejavu
