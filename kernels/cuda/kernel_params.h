// What the ops of Backend get, as the parameters of kernels (kernels/cuda/params.h).
#ifndef KERNELS_CUDA_KERNEL_PARAMS_H_
#define KERNELS_CUDA_KERNEL_PARAMS_H_

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/base/round.h"
#include "kernels/cuda/device_queue.h"
#include "kernels/cuda/params.h"
#include "kernels/selection.h"
#include "kernels/tensor.h"

namespace dejavu::cuda {

inline constexpr int64_t kVectorBytes = 16;  // what a kernel reads at once, where it can

// CHECKs that it fits.
int32_t Int(int64_t value);

template <typename T>
MatrixOf<T> MatrixFrom(const Tensor& t) {
  return {static_cast<T*>(t.data), t.stride};
}
template <typename T>
T* VectorFrom(const Tensor& t) {
  return static_cast<T*>(t.data);
}

const char* NameOf(Kernel kernel);
WeightType TypeOf(DType dtype);

// Whether kVectorBytes can be read at once from every row on.
bool HasVectors(const Tensor& t);

bool SameView(const Tensor& a, const Tensor& b);
// Whether they have memory in common.
bool Overlap(const Tensor& a, const Tensor& b);

// A block for each piece of each row.
inline DeviceQueue::Grid RowGrid(const Tensor& y) { return {DivideUp(y.cols, kBlockThreads), y.rows}; }

// With the masks from row `first_row` on, if they are wanted.
SelectionParams SelectionFrom(const Selection& selection, bool masks, int64_t first_row = 0);

// Rows whose keys and values are stored, or that attend to them.
struct KvRows {
  KvLayer kv;
  Tensor qkv;  // [rows, 3 * heads * head_dim]
  RowTable rows;
};
// Of the rows from `first_row` on, as far as WriteKv uses them.
AttentionParams AttentionFrom(const KvRows& rows, int64_t first_row);

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_KERNEL_PARAMS_H_
