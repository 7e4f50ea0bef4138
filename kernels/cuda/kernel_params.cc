#include "kernels/cuda/kernel_params.h"

#include "kernels/base/check.h"

namespace dejavu::cuda {

int32_t Int(int64_t value) {
  CHECK(value >= INT32_MIN && value <= INT32_MAX) << value;
  return static_cast<int32_t>(value);
}

const char* NameOf(Kernel kernel) {
  static constexpr const char* kNames[] = {
#define DEJAVU_CUDA_KERNEL_NAME(name, params) #name,
      DEJAVU_CUDA_KERNELS(DEJAVU_CUDA_KERNEL_NAME)
#undef DEJAVU_CUDA_KERNEL_NAME
  };
  return kNames[kernel];
}

WeightType TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return kF32;
    case DType::kFloat16:
      return kF16;
    case DType::kBFloat16:
      return kBF16;
    default:
      CHECK(dtype == DType::kInt8) << "weights of type " << Name(dtype);
      return kI8;
  }
}

bool HasVectors(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % kVectorBytes == 0 && t.stride * SizeOf(t.dtype) % kVectorBytes == 0;
}

bool SameView(const Tensor& a, const Tensor& b) {
  return a.data == b.data && a.rows == b.rows && a.cols == b.cols && a.stride == b.stride;
}

bool Overlap(const Tensor& a, const Tensor& b) {
  const auto end = [](const Tensor& t) {
    return static_cast<const char*>(t.data) + ((t.rows - 1) * t.stride + t.cols) * SizeOf(t.dtype);
  };
  return a.data < end(b) && b.data < end(a);
}

SelectionParams SelectionFrom(const Selection& selection, bool masks, int64_t first_row) {
  SelectionParams p = {};
  if (selection.all()) return p;
  p.list = VectorFrom<int32_t>(selection.indices);
  p.count = VectorFrom<int32_t>(selection.count);
  if (!masks || selection.masks.empty()) return p;
  p.masks = MatrixFrom<const int32_t>(selection.masks);
  p.masks.data += first_row * p.masks.stride;
  if (!selection.strict.empty()) p.strict = VectorFrom<int32_t>(selection.strict) + first_row;
  return p;
}

AttentionParams AttentionFrom(const KvRows& rows, int64_t first_row) {
  const KvLayer& kv = rows.kv;
  CHECK(kv.head_dim <= kMostHeadDim) << "heads of " << kv.head_dim << " features";
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; };
  constexpr int32_t kPiece = 8;
  AttentionParams p = {};
  p.qkv = MatrixFrom<const float>(rows.qkv);
  p.qkv.data += first_row * p.qkv.stride;
  p.keys = kv.keys;
  p.values = kv.values;
  p.positions = VectorFrom<int32_t>(rows.rows.positions) + first_row;
  p.sequences = VectorFrom<int32_t>(rows.rows.sequences) + first_row;
  p.block_table = MatrixFrom<const int32_t>(rows.rows.block_table);
  if (!rows.rows.saturated.empty()) p.saturated = VectorFrom<int32_t>(rows.rows.saturated) + first_row;
  p.heads = kv.heads;
  p.head_dim = kv.head_dim;
  p.block_tokens = kv.block_tokens;
  p.vectors = kv.block_tokens % kPiece == 0 && kv.head_dim % kPiece == 0 && aligned(kv.keys) && aligned(kv.values);
  return p;
}

}  // namespace dejavu::cuda
