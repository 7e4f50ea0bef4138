// HalfRows: rows of float32 vectors kept as float16, in half the memory. One thread.
#ifndef ENGINE_CALIBRATION_HALF_ROWS_H_
#define ENGINE_CALIBRATION_HALF_ROWS_H_

#include <cstdint>
#include <vector>

namespace dejavu {

class HalfRows {
 public:
  void Reserve(int64_t rows, int64_t cols);
  void Append(const float* row);
  int64_t rows() const { return cols_ == 0 ? 0 : static_cast<int64_t>(bits_.size()) / cols_; }
  int64_t cols() const { return cols_; }
  void Copy(int64_t row, float* to) const;

 private:
  int64_t cols_ = 0;
  std::vector<uint16_t> bits_;
};

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_HALF_ROWS_H_
