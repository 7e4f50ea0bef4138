// Tensor: a two-dimensional view of device memory, copied freely, frees nothing. Buffer: the owner of device memory.
// A vector is a tensor of one row. Any thread; what a tensor points at belongs to whoever runs the step.
#ifndef KERNELS_TENSOR_H_
#define KERNELS_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>

#include "kernels/base/check.h"

namespace dejavu {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kInt32, kInt8 };

constexpr int64_t SizeOf(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4 : dtype == DType::kInt8 ? 1 : 2;
}
const char* Name(DType dtype);  // "float32", "float16", "bfloat16", "int32", "int8"

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // elements from one row to the next, >= cols

  bool empty() const { return data == nullptr; }
  int64_t bytes() const { return rows * cols * SizeOf(dtype); }

  // Views; bounds are CHECKed.
  Tensor Rows(int64_t first, int64_t count) const;
  Tensor Cols(int64_t first, int64_t count) const;

  // Typed row access on the host; only for memory that the host can read.
  template <typename T>
  T* row(int64_t r) const {
    return static_cast<T*>(data) + r * stride;
  }
};

// Owns `bytes` of one backend's memory, 64-byte aligned at least, zeroed.
class Buffer {
 public:
  using Free = std::function<void(void*)>;
  Buffer() = default;
  Buffer(void* data, int64_t bytes, Free free) : data_(data), bytes_(bytes), free_(std::move(free)) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(free_, other.free_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) free_(data_);
  }

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

  // The view of rows x cols elements that starts `offset_bytes` into the buffer.
  Tensor View(int64_t offset_bytes, DType dtype, int64_t rows, int64_t cols) const;

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  Free free_;
};

}  // namespace dejavu

#endif  // KERNELS_TENSOR_H_
