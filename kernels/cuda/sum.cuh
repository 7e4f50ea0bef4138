// y = W x + b where an input is a row of the weight: a sum of the rows whose inputs are selected.
//
// A block has a segment of the inputs and a slab of columns: 16 bytes for each lane. Of the segment each warp has a
// part of its own, finds in it the inputs that are selected and not zero, in ascending order, and adds their rows, one
// fused multiply-add after the other. Then the warps' sums are added in order, and by the last block of a slab the
// segments'. Who adds what depends on the number of an input alone, and adding zero changes no bit (weights are
// finite), so that leaving out what is zero gives the same result.
//
// Bytes: the selected rows of the weight, once for each group of rows of x; partial sums of segments / inputs of that.
#ifndef KERNELS_CUDA_SUM_CUH_
#define KERNELS_CUDA_SUM_CUH_

#include "kernels/cuda/common.cuh"

namespace dejavu::cuda {

template <typename W, int kRows>
class SumBlock {
 public:
  // Dynamic shared memory, in bytes: kRows floats and 3 bytes for each input of a segment, and room for Spread.
  DJ_DEVICE SumBlock(const SumParams& p, float* shared)
      : p_(p),
        first_row_(p.first_row + static_cast<int>(blockIdx.x) * kRows),
        rows_(Min(kRows, p.rows - first_row_)),
        slab_(static_cast<int>(blockIdx.y)),
        segment_(static_cast<int>(blockIdx.z)),
        first_(segment_ * p.segment),
        inputs_(Min(p.segment, p.inputs - first_)),
        x_(shared),
        list_(reinterpret_cast<uint16_t*>(shared + Max(p.segment * kRows, kWarps * kSlabFloats))),
        chosen_(reinterpret_cast<uint8_t*>(list_ + p.segment)) {}

  DJ_DEVICE void Run() {
    Choose();
    Stage();
    if (p_.active != nullptr && blockIdx.x == 0) CountActive();
    float sums[kRows][kPiece] = {};
    Accumulate(Compact(), sums);
    Join(sums);
  }

 private:
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(W));  // columns of a lane
  static constexpr int kSlab = 32 * kPiece;
  static constexpr int kSlabFloats = kRows * kSlab;
  static constexpr int kLoadsInFlight = kRows == 1 ? 8 : 4;

  // chosen_[i]: input i of the segment is selected.
  DJ_DEVICE void Choose() {
    const SelectionParams& s = p_.selected;
    const bool listed = s.list != nullptr && s.masks.data == nullptr;
    for (int i = Thread(); i < inputs_; i += kBlockThreads) {
      const int unit = (first_ + i) / p_.group;
      chosen_[i] = s.masks.data != nullptr ? UnionWord(s.masks, p_.rows, unit / 32) >> (unit % 32) & 1 : !listed;
    }
    if (!listed) return;
    __syncthreads();
    const int count = s.count[0];
    for (int i = Thread(); i < count; i += kBlockThreads) {
      const int begin = s.list[i] * p_.group - first_;
      for (int j = Max(begin, 0); j < Min(begin + p_.group, inputs_); ++j) chosen_[j] = 1;
    }
  }

  // x_[i][r]: what input i of the segment is in each row; int8 weights' scales included.
  DJ_DEVICE void Stage() {
    __syncthreads();
    for (int r = 0; r < kRows; ++r) {
      const float* from = Row(p_.x, first_row_ + Min(r, rows_ - 1)) + first_;
      for (int i = Thread(); i < inputs_; i += kBlockThreads) {
        float x = chosen_[i] && r < rows_ ? from[i] : 0.0f;
        if (sizeof(W) == 1) x *= p_.scale[first_ + i];
        x_[i * kRows + r] = x;
      }
    }
    __syncthreads();
  }

  // The slabs of a segment share its inputs: each counts some of all rows.
  DJ_DEVICE void CountActive() const {
    const int warps = static_cast<int>(gridDim.y) * kWarps;
    for (int base = (slab_ * kWarps + Warp()) * 32; base < inputs_; base += warps * 32) {
      const int i = base + Lane();
      const bool chosen = i < inputs_ && chosen_[i];
      bool any = false;
      for (int r = 0; r < p_.rows; ++r) {
        const bool active = chosen && Row(p_.x, r)[first_ + i] != 0.0f;
        any = any || active;
        if (r < p_.counted) AddCount(active, p_.active + r);
      }
      AddCount(any, p_.active + p_.counted);
    }
  }
  static DJ_DEVICE void AddCount(bool value, int32_t* to) {
    const int count = __popc(__ballot_sync(kAllLanes, value));
    if (Lane() == 0 && count > 0) atomicAdd(to, count);
  }

  // This warp's inputs that add something to list_, from its part's place on; returns how many.
  DJ_DEVICE int Compact() {
    const int part = p_.segment / kWarps, begin = Warp() * part;
    int count = 0;
    for (int base = begin; base < Min(begin + part, inputs_); base += 32) {
      const int i = base + Lane();
      bool wanted = i < inputs_ && chosen_[i];
      if (wanted && p_.skip_zeros) {
        wanted = false;
#pragma unroll
        for (int r = 0; r < kRows; ++r) wanted = wanted || x_[i * kRows + r] != 0.0f;
      }
      const uint32_t votes = __ballot_sync(kAllLanes, wanted);
      if (wanted) list_[begin + count + __popc(votes & ((1u << Lane()) - 1))] = static_cast<uint16_t>(i);
      count += __popc(votes);
    }
    __syncwarp();
    return count;
  }

  DJ_DEVICE void Accumulate(int count, float (&sums)[kRows][kPiece]) const {
    const int column = slab_ * kSlab + Lane() * kPiece, left = p_.outputs - column;
    if (left <= 0) return;
    const W* weight = static_cast<const W*>(p_.weight) + first_ * p_.stride + column;
    const bool vectors = p_.vectors && left >= kPiece;
    const uint16_t* list = list_ + Warp() * (p_.segment / kWarps);
    int n = 0;
    for (; vectors && n + kLoadsInFlight <= count; n += kLoadsInFlight) {
      Vector16 v[kLoadsInFlight];
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) v[i] = LoadStream(weight + list[n + i] * p_.stride);
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; ++i) Add(v[i], list[n + i], sums);
    }
    for (; n < count; ++n) {
      const W* from = weight + list[n] * p_.stride;
      Add(vectors ? LoadStream(from) : LoadPart(from, left), list[n], sums);
    }
  }

  DJ_DEVICE void Add(const Vector16& v, int input, float (&sums)[kRows][kPiece]) const {
    float w[kPiece];
    WidenPiece(v, w, static_cast<const W*>(nullptr));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float x = x_[input * kRows + r];
#pragma unroll
      for (int c = 0; c < kPiece; ++c) sums[r][c] = fmaf(x, w[c], sums[r][c]);
    }
  }

  // In shared memory and in `partial` column kPiece * l + c of a slab lies at 32 * c + l: no bank conflicts.
  DJ_DEVICE void Join(const float (&sums)[kRows][kPiece]) {
    __syncthreads();  // x_ has been read
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kPiece; ++c) x_[Warp() * kSlabFloats + r * kSlab + c * 32 + Lane()] = sums[r][c];
    }
    __syncthreads();
    const int slabs = static_cast<int>(gridDim.y), segments = static_cast<int>(gridDim.z);
    const int64_t row_stride = int64_t{slabs} * kSlab, segment_stride = kRows * row_stride;
    float* partial = p_.partial + blockIdx.x * segments * segment_stride + slab_ * kSlab;
    for (int i = Thread(); i < rows_ * kSlab; i += kBlockThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += x_[w * kSlabFloats + i];
      partial[segment_ * segment_stride + i / kSlab * row_stride + i % kSlab] = sum;
    }
    if (!IsLastBlock(p_.tickets + static_cast<int>(blockIdx.x) * slabs + slab_, gridDim.z)) return;
    for (int i = Thread(); i < rows_ * kSlab; i += kBlockThreads) {
      const int r = i / kSlab, column = slab_ * kSlab + i % 32 * kPiece + i % kSlab / 32;
      if (column >= p_.outputs) continue;
      float sum = 0.0f;
#pragma unroll 4
      for (int s = 0; s < segments; ++s) sum += partial[s * segment_stride + r * row_stride + i % kSlab];
      Row(p_.y, first_row_ + r)[column] = p_.bias != nullptr ? sum + p_.bias[column] : sum;
    }
  }

  const SumParams& p_;
  const int first_row_, rows_;
  const int slab_, segment_;
  const int first_, inputs_;  // of the segment
  float* const x_;            // [segment][kRows]; later the warps' sums [kWarps][kRows][kSlab]
  uint16_t* const list_;      // [segment]
  uint8_t* const chosen_;     // [segment]
};

template <typename W, int kRows>
DJ_DEVICE void Sum(const SumParams& p) {
  DJ_DYNAMIC_SHARED(float, shared);
  GridWait();
  GridLaunchDependents();
  SumBlock<W, kRows>(p, shared).Run();
}

DJ_KERNEL(SumF32x1, SumParams, kBlockThreads) { Sum<float, 1>(p); }
DJ_KERNEL(SumF32x4, SumParams, kBlockThreads) { Sum<float, 4>(p); }
DJ_KERNEL(SumF32x8, SumParams, kBlockThreads) { Sum<float, 8>(p); }
DJ_KERNEL(SumF16x1, SumParams, kBlockThreads) { Sum<Half, 1>(p); }
DJ_KERNEL(SumF16x4, SumParams, kBlockThreads) { Sum<Half, 4>(p); }
DJ_KERNEL(SumF16x8, SumParams, kBlockThreads) { Sum<Half, 8>(p); }
DJ_KERNEL(SumBF16x1, SumParams, kBlockThreads) { Sum<BFloat16, 1>(p); }
DJ_KERNEL(SumBF16x4, SumParams, kBlockThreads) { Sum<BFloat16, 4>(p); }
DJ_KERNEL(SumBF16x8, SumParams, kBlockThreads) { Sum<BFloat16, 8>(p); }
DJ_KERNEL(SumI8x1, SumParams, kBlockThreads) { Sum<int8_t, 1>(p); }
DJ_KERNEL(SumI8x4, SumParams, kBlockThreads) { Sum<int8_t, 4>(p); }

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_SUM_CUH_
