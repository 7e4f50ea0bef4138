// y = W x + b where an input is a row of the weight: a sum of the rows whose inputs are selected.
//
// A block has a segment of the inputs and a slab of columns: 16 bytes for each lane. Of the segment each warp has a
// part of its own, whose selected inputs it adds in ascending order, one fused multiply-add after the other. Then the
// warps' sums are added in order, and then the segments', by the last block of a slab or by JoinSums. Who adds what
// depends on the number of an input alone, and adding zero changes no bit (weights are finite), so that leaving out
// what is zero gives the same result.
//
// A warp works for itself until the warps' sums are joined. It looks at 32 inputs at a time, a lane at each, and keeps
// in its window those that add something, with their x. Their rows come by way of its ring in shared memory, where each
// lane copies and reads bytes of its own. As far as the inputs are known without x, the ring begins to fill before
// GridWait.
//
// Bytes: the selected rows of the weight, once for each group of rows of x; partial sums of segments / inputs of that.
#ifndef KERNELS_CUDA_SUM_CUH_
#define KERNELS_CUDA_SUM_CUH_

#include "kernels/cuda/norm.cuh"

namespace dejavu::cuda {

// Element (row, column) of y, from all segments' sums.
DJ_DEVICE float JoinedSum(const SegmentSums& p, int row, int column) {
  const float* partial = Row(p.partial, row) + column;
  const int64_t stride = p.rows * p.partial.stride;
  float sum = 0.0f;
#pragma unroll 8
  for (int s = 0; s < p.segments; ++s) sum += partial[s * stride];
  return p.bias != nullptr ? sum + p.bias[column] : sum;
}

template <typename W, int kRows, int kRing>
class SumBlock {
 public:
  // Dynamic shared memory: SumSharedBytes.
  DJ_DEVICE SumBlock(const SumParams& p, unsigned char* shared)
      : p_(p),
        first_row_(static_cast<int>(blockIdx.x) * kRows),
        rows_(Min(kRows, p.sums.rows - first_row_)),
        slab_(static_cast<int>(blockIdx.y)),
        segment_(static_cast<int>(blockIdx.z)),
        column_(slab_ * kSlab + Lane() * kPiece),
        weight_(static_cast<const W*>(p.weight) + column_),
        stride_bytes_(static_cast<int>(p.stride) * static_cast<int>(sizeof(W))),
        copies_(p.vectors && column_ + kPiece <= p.outputs),
        listed_(p.selected.list != nullptr),
        begin_(segment_ * p.segment + Warp() * (p.segment / kWarps)),
        end_(Min(begin_ + p.segment / kWarps, p.inputs)),
        ring_(reinterpret_cast<Vector16*>(shared) + Warp() * kRing * kRowVectors + Lane()),
        x_(reinterpret_cast<float*>(shared + kWarps * kRing * kSumRowBytes) + Warp() * kSumWindow * kRows),
        known_inputs_(reinterpret_cast<uint32_t*>(shared + kWarps * kRing * kSumRowBytes +
                                                  kWarps * kSumWindow * kRows * sizeof(float)) +
                      Warp() * kSumWindow),
        joined_(reinterpret_cast<float*>(shared)) {}

  DJ_DEVICE void Run() {
    const bool early = listed_ ? p_.list_early != 0 : p_.skip_zeros == 0;
    if (!early) GridWait();
    if (listed_) FindFirst();
    Fetch();
    const bool filled = early || !p_.skip_zeros;
    if (filled) FillRing();
    if (early) GridWait();
    GridLaunchDependents();

    float sums[kRows][kPiece] = {};
    // Each step adds a slot and fills it anew; the first ones only fill.
    for (int n = filled ? -kSumSlotInputs : -kRing; n < 0 || n < known_; n += kSumSlotInputs) {
      if (n >= 0) {
        CopyAsyncWait<kRing / kSumSlotInputs - 1>();
        AddSlot(n, sums);
      }
      FillSlot(n + kRing);
    }
    Join(sums);
  }

 private:
  static constexpr int kRowVectors = kSumRowBytes / static_cast<int>(sizeof(Vector16));
  static constexpr int kPiece = static_cast<int>(sizeof(Vector16) / sizeof(W));  // columns of a lane
  static constexpr int kSlab = 32 * kPiece;
  static constexpr int kUnrolledInputs = kRows * kPiece <= 32 ? kSumSlotInputs : 1;  // of a slot
  // Of joined_: column kPiece * l + c of a slab lies at kColumnStride * c + l. Neither side has bank conflicts.
  static constexpr int kColumnStride = 32 + 32 / kPiece;
  static constexpr int kJoinedRow = kPiece * kColumnStride;
  static_assert(kRing <= 32 && kRing + 32 <= kSumWindow && kRing % kSumSlotInputs == 0);
  static_assert((kRing & (kRing - 1)) == 0 && (kSumWindow & (kSumWindow - 1)) == 0);

  // The first entry of the list that is not before this warp's part, and where in it the part begins. Of 32 places at
  // a time, the last that is before it.
  DJ_DEVICE void FindFirst() {
    const int32_t* list = p_.selected.list;
    entries_ = LoadOld(p_.selected.count);
    const int unit = begin_ / p_.group;
    for (int left = entries_; left > 0;) {
      const int step = DivideUp(left, 32), place = Lane() * step;
      const bool before = place < left && LoadOld(list + first_entry_ + place) < unit;
      const int places = __popc(__ballot_sync(kAllLanes, before));
      if (places == 0) break;
      const int passed = (places - 1) * step + 1;
      first_entry_ += passed;
      left = Min(step - 1, left - passed);
    }
    if (first_entry_ < entries_) fetched_ = Max(0, begin_ - LoadOld(list + first_entry_) * p_.group);
  }

  // next_: the selected inputs to look at next, one for each lane; beyond the part -1.
  DJ_DEVICE void Fetch() {
    const int i = fetched_ + Lane();
    int input = begin_ + i;
    if (listed_) {
      const int entry = first_entry_ + i / p_.group;
      input = entry < entries_ ? LoadOld(p_.selected.list + entry) * p_.group + i % p_.group : end_;
    }
    next_ = input < end_ ? input : -1;
    more_ = __any_sync(kAllLanes, next_ >= 0) != 0;
    fetched_ += 32;
  }

  // With the inputs that will be looked at first, whatever their x; FillSlot commits the last of it.
  DJ_DEVICE void FillRing() {
    for (int i = 0; i < kRing; ++i) {
      const int input = __shfl_sync(kAllLanes, next_, i);
      if (input >= 0 && copies_) CopyAsync16(PlaceOf(i), RowOf(input));
      if (input >= 0 && !copies_) *PlaceOf(i) = LoadRowPart(input);
      if (i % kSumSlotInputs == kSumSlotInputs - 1 && i != kRing - 1) CopyAsyncCommit();
    }
    filled_ = kRing;
  }

  DJ_DEVICE void FillSlot(int n) {
    while (known_ < n + kSumSlotInputs && more_) Look();
    if (n >= filled_ && copies_) {
#pragma unroll
      for (int i = 0; i < kSumSlotInputs; ++i) {
        if (n + i < known_) CopyAsync16(PlaceOf(n) + i * kRowVectors, RowOf(KnownInput(n, i)));
      }
    } else if (n >= filled_) {
#pragma unroll 1
      for (int i = 0; i < Min(kSumSlotInputs, known_ - n); ++i) {
        PlaceOf(n)[i * kRowVectors] = LoadRowPart(KnownInput(n, i));
      }
    }
    CopyAsyncCommit();
  }

  // Input i of the slot that begins with n.
  DJ_DEVICE int KnownInput(int n, int i) const {
    return begin_ + static_cast<int>(known_inputs_[(n & (kSumWindow - 1)) + i] & 0xFFFF);
  }
  DJ_DEVICE Vector16* PlaceOf(int i) const { return ring_ + (i & (kRing - 1)) * kRowVectors; }
  DJ_DEVICE const W* RowOf(int input) const {
    return reinterpret_cast<const W*>(reinterpret_cast<const char*>(weight_) + int64_t{input} * stride_bytes_);
  }
  DJ_DEVICE Vector16 LoadRowPart(int input) const { return LoadPart(RowOf(input), p_.outputs - column_); }

  // Looks at the next inputs. An input of the window: its number within the part, in the upper half the rows where it
  // is not zero; and what it is in each row, int8 weights' scales included.
  DJ_DEVICE void Look() {
    const int input = next_;
    Fetch();
    float x[kRows];
    uint32_t rows = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      x[r] = input >= 0 && r < rows_ ? Row(p_.x, first_row_ + r)[input] : 0.0f;
      if (x[r] != 0.0f) rows |= 1u << r;
    }
    if (p_.active != nullptr) CountActive(input, rows);
    const bool wanted = input >= 0 && (!p_.skip_zeros || rows != 0 || known_ + Lane() < filled_);
    const uint32_t votes = __ballot_sync(kAllLanes, wanted);
    __syncwarp();  // what is overwritten has been read
    if (wanted) {
      const int place = (known_ + __popc(votes & ((1u << Lane()) - 1))) & (kSumWindow - 1);
      const float scale = sizeof(W) == 1 ? p_.scale[input] : 1.0f;
      known_inputs_[place] = static_cast<uint32_t>(input - begin_) | rows << 16;
#pragma unroll
      for (int r = 0; r < kRows; ++r) x_[place * kRows + r] = x[r] * scale;
    }
    known_ += __popc(votes);
    __syncwarp();
  }

  // The slabs of a segment look at the same inputs: each counts some of them, of all rows.
  DJ_DEVICE void CountActive(int input, uint32_t rows) const {
    const int turn = fetched_ / 32 + Warp();
    if (blockIdx.x != 0 || turn % static_cast<int>(gridDim.y) != slab_) return;
    bool any = false;
    for (int r = 0; r < p_.all_rows; ++r) {
      const bool active = r < kRows ? (rows >> r & 1) != 0 : input >= 0 && Row(p_.x, r)[input] != 0.0f;
      any = any || active;
      if (r < p_.counted) AddCount(active, p_.active + r);
    }
    AddCount(any, p_.active + p_.counted);
  }
  static DJ_DEVICE void AddCount(bool value, int32_t* to) {
    const int count = __popc(__ballot_sync(kAllLanes, value));
    if (Lane() == 0 && count > 0) atomicAdd(to, count);
  }

  DJ_DEVICE void AddSlot(int n, float (&sums)[kRows][kPiece]) const {
    const Vector16* weights = PlaceOf(n);
    const int known = n & (kSumWindow - 1);
    if (n + kSumSlotInputs <= known_) {
#pragma unroll kUnrolledInputs
      for (int i = 0; i < kSumSlotInputs; ++i) AddInput(weights[i * kRowVectors], known + i, sums);
    } else {
#pragma unroll 1
      for (int i = 0; i < known_ - n; ++i) AddInput(weights[i * kRowVectors], known + i, sums);
    }
  }

  DJ_DEVICE void AddInput(const Vector16& weights, int known, float (&sums)[kRows][kPiece]) const {
    float w[kPiece];
    WidenPiece(weights, w, static_cast<const W*>(nullptr));
    if constexpr (kRows == 1) {
      AddRow(x_[known], w, sums[0]);
    } else {
      AddRows(x_ + known * kRows, known_inputs_[known] >> 16, w, sums);
    }
  }

  // All lanes have the same x: with many rows, most of them zero after ReLU, leaving those out is cheaper.
  static DJ_DEVICE void AddRows(const float* x, uint32_t rows, const float (&w)[kPiece], float (&sums)[kRows][kPiece]) {
    constexpr uint32_t kFour = 0xF;
#pragma unroll
    for (int first = 0; first < kRows; first += 4) {
      const Vector16 v = *reinterpret_cast<const Vector16*>(x + first);
      const uint32_t four = kRows > 4 ? rows >> first & kFour : kFour;
      if (four == kFour) {
#pragma unroll
        for (int r = 0; r < 4; ++r) AddRow(__uint_as_float(v.w[r]), w, sums[first + r]);
      } else if (four != 0) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if ((four >> r & 1) != 0) AddRow(__uint_as_float(v.w[r]), w, sums[first + r]);
        }
      }
    }
  }
  static DJ_DEVICE void AddRow(float x, const float (&w)[kPiece], float (&sums)[kPiece]) {
#pragma unroll
    for (int c = 0; c < kPiece; ++c) sums[c] = fmaf(x, w[c], sums[c]);
  }

  DJ_DEVICE void Join(const float (&sums)[kRows][kPiece]) {
    __syncthreads();  // rings and windows have been read
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kPiece; ++c) {
        joined_[(Warp() * kRows + r) * kJoinedRow + c * kColumnStride + Lane()] = sums[r][c];
      }
    }
    __syncthreads();
    for (int i = Thread(); i < rows_ * kSlab; i += kBlockThreads) {
      const int r = i / kSlab, column = i % kSlab;
      const float* from = joined_ + r * kJoinedRow + column % kPiece * kColumnStride + column / kPiece;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += from[w * kRows * kJoinedRow];
      Row(p_.sums.partial, segment_ * p_.sums.rows + first_row_ + r)[slab_ * kSlab + column] = sum;
    }
    if (p_.tickets == nullptr || !IsLastBlock(p_.tickets + slab_, gridDim.z)) return;
    for (int i = Thread(); i < rows_ * kSlab; i += kBlockThreads) {
      const int r = i / kSlab, column = slab_ * kSlab + i % kSlab;
      if (column < p_.outputs) Row(p_.y, r)[column] = JoinedSum(p_.sums, r, column);
    }
    if constexpr (kRows <= kSumNormRows) NormIfLast();
  }

  // The last slab's block adds the rows to the residual stream and normalises them: a launch less, where rows are few.
  DJ_DEVICE void NormIfLast() {
    if (p_.norm.rows == 0 || !IsLastBlock(p_.tickets + gridDim.y, gridDim.y)) return;
    NormBlock</*kAhead=*/false> norm(p_.norm, joined_);
    for (int row = 0; row < p_.norm.rows; ++row) {
      norm.Run(row);
      __syncthreads();  // the row in shared memory has been read
    }
  }

  const SumParams& p_;
  const int first_row_, rows_;
  const int slab_, segment_;
  const int column_;       // the first of this lane's
  const W* const weight_;  // from there on
  const int stride_bytes_;
  const bool copies_;  // 16 bytes of this lane's columns at once
  const bool listed_;
  const int begin_, end_;         // inputs: this warp's part
  Vector16* const ring_;          // [kRing], kRowVectors apart: this lane's
  float* const x_;                // [kSumWindow][kRows]
  uint32_t* const known_inputs_;  // [kSumWindow]
  float* const joined_;           // [kWarps][kRows][kJoinedRow], in place of all that

  int entries_ = 0, first_entry_ = 0;  // of the list
  int fetched_ = 0;                    // inputs
  int next_ = -1;
  bool more_ = false;  // next_ has some
  int known_ = 0;      // inputs that have been in the window
  int filled_ = 0;     // of the ring, by FillRing
};

template <typename W, int kRows, int kRing>
DJ_DEVICE void Sum(const SumParams& p) {
  DJ_DYNAMIC_SHARED(unsigned char, shared);
  SumBlock<W, kRows, kRing>(p, shared).Run();
}

DJ_KERNEL(SumF32x1, SumParams, kBlockThreads) { Sum<float, 1, kSumRing>(p); }
DJ_KERNEL(SumF32x4, SumParams, kBlockThreads) { Sum<float, 4, kSumRing>(p); }
DJ_KERNEL(SumF32x8, SumParams, kBlockThreads) { Sum<float, 8, kSumRing>(p); }
DJ_KERNEL(SumF16x1, SumParams, kBlockThreads) { Sum<Half, 1, kSumRing>(p); }
DJ_KERNEL(SumF16x4, SumParams, kBlockThreads) { Sum<Half, 4, kSumRing>(p); }
DJ_KERNEL(SumF16x8, SumParams, kBlockThreads) { Sum<Half, 8, kSumRing>(p); }
DJ_WIDE_KERNEL(SumF16x16, SumParams, kBlockThreads) { Sum<Half, 16, kSumWideRing>(p); }
DJ_KERNEL(SumBF16x1, SumParams, kBlockThreads) { Sum<BFloat16, 1, kSumRing>(p); }
DJ_KERNEL(SumBF16x4, SumParams, kBlockThreads) { Sum<BFloat16, 4, kSumRing>(p); }
DJ_KERNEL(SumBF16x8, SumParams, kBlockThreads) { Sum<BFloat16, 8, kSumRing>(p); }
DJ_WIDE_KERNEL(SumBF16x16, SumParams, kBlockThreads) { Sum<BFloat16, 16, kSumWideRing>(p); }
DJ_KERNEL(SumI8x1, SumParams, kBlockThreads) { Sum<int8_t, 1, kSumRing>(p); }
DJ_KERNEL(SumI8x4, SumParams, kBlockThreads) { Sum<int8_t, 4, kSumRing>(p); }
DJ_WIDE_KERNEL(SumI8x8, SumParams, kBlockThreads) { Sum<int8_t, 8, kSumWideRing>(p); }

// Right behind a Sum that leaves the segments' sums. Grid (pieces of columns, rows).
DJ_KERNEL(JoinSums, SumParams, kBlockThreads) {
  GridWait();
  GridLaunchDependents();
  const int column = static_cast<int>(blockIdx.x) * kBlockThreads + Thread(), row = static_cast<int>(blockIdx.y);
  if (column < p.outputs) Row(p.y, row)[column] = JoinedSum(p.sums, row, column);
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_SUM_CUH_
