// What the attention of few rows (decode_attention.cuh) and that of many (prompt_attention.cuh) share: the paged cache,
// how values are rounded into it, and storing keys and values by a launch of its own.
#ifndef KERNELS_CUDA_ATTENTION_CUH_
#define KERNELS_CUDA_ATTENTION_CUH_

#include "kernels/cuda/common.cuh"

namespace dejavu::cuda {

constexpr int kPieceElements = 8;  // that a lane reads at once

// Both return whether the value was beyond the range of the type.
DJ_DEVICE bool StoreKv(float* to, float value) {
  *to = value;
  return false;
}
DJ_DEVICE bool StoreKv(Half* to, float value) {
  constexpr float kMost = 65504.0f;
  const bool above = value > kMost, below = value < -kMost;
  to->bits = FloatToHalf(above ? kMost : below ? -kMost : value);  // NaN stays
  return above || below;
}

// That so many of the row's keys and values were beyond the range. Hardly ever any.
DJ_DEVICE void CountSaturated(const AttentionParams& p, int row, int count) {
  if (count > 0 && p.saturated != nullptr) atomicAdd(p.saturated + row, count);
}

DJ_DEVICE void LoadPiece(const float* from, float (&to)[kPieceElements]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Vector16 v = LoadVector(from + 4 * half);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[4 * half + i] = __uint_as_float(v.w[i]);
  }
}
DJ_DEVICE void LoadPiece(const Half* from, float (&to)[kPieceElements]) { WidenPiece(LoadVector(from), to, from); }

// A row and a head of the cache.
template <typename Kv>
class CacheOf {
 public:
  DJ_DEVICE CacheOf(const AttentionParams& p, int row, int head)
      : p_(p), table_(Row(p.block_table, p.sequences[row])), row_(row), head_(head) {}

  // Where position `position` has feature 0; keys of other features are block_tokens apart, values one.
  DJ_DEVICE Kv* Key(int position) const { return At(p_.keys, position) + position % p_.block_tokens; }
  DJ_DEVICE Kv* Value(int position) const { return At(p_.values, position) + position % p_.block_tokens * p_.head_dim; }

  // Q (0), K (1) or V (2) in qkv of the row of this step that stands at `position`.
  DJ_DEVICE const float* Own(int position, int part) const {
    return Row(p_.qkv, row_ - (p_.positions[row_] - position)) + (part * p_.heads + head_) * p_.head_dim;
  }

  DJ_DEVICE void Store(int position) const {
#pragma unroll 1
    for (int d = Thread(); d < p_.head_dim; d += kBlockThreads) {
      const float key = Own(position, 1)[d], value = Own(position, 2)[d];
      const int beyond = StoreKv(Key(position) + d * p_.block_tokens, key) + StoreKv(Value(position) + d, value);
      CountSaturated(p_, row_, beyond);
    }
  }

 private:
  DJ_DEVICE Kv* At(void* memory, int position) const {
    const int64_t block = table_[position / p_.block_tokens];
    return static_cast<Kv*>(memory) + (block * p_.heads + head_) * p_.block_tokens * p_.head_dim;
  }

  const AttentionParams& p_;
  const int32_t* const table_;
  const int row_, head_;
};

// Whether this head is one of the selected ones.
DJ_DEVICE bool IsListed(const SelectionParams& s, int head) {
  if (s.list == nullptr) return true;
  int listed = 0;
  const int count = LoadOld(s.count);
  for (int i = Thread(); i < count; i += kBlockThreads) listed |= LoadOld(s.list + i) == head;
  return __syncthreads_or(listed);
}

template <typename Kv>
DJ_DEVICE void WriteKv(const AttentionParams& p) {
  GridWait();
  GridLaunchDependents();
  const int row = static_cast<int>(blockIdx.z), head = static_cast<int>(blockIdx.y);
  CacheOf<Kv>(p, row, head).Store(p.positions[row]);
}

DJ_KERNEL(WriteKvF16, AttentionParams, kBlockThreads) { WriteKv<Half>(p); }
DJ_KERNEL(WriteKvF32, AttentionParams, kBlockThreads) { WriteKv<float>(p); }

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_ATTENTION_CUH_
