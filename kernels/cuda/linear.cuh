// y = W x + b where an output is a row of the weight, for up to 16 rows of x, at the speed at which the weight is read.
//
// A block has a range of the outputs, alike in all blocks, so that they end together; its warps share the inputs: each
// has a fixed range of them, a whole number of windows (fragments.cuh), that depends on the number of inputs alone. A
// warp passes over its inputs once for up to kTiles tiles of 16 outputs, whose sums it keeps in registers; then the
// warps' sums are added in order. So a row's sums have one order, whoever shares its step and however many blocks run.
//
// Weights flow through a ring of each warp's own in shared memory. It begins to fill before the launch before this one
// has ended: weights never change, and which outputs are wanted is known then, or lies in a list that is old enough.
// A lane copies what it reads itself, so that nobody waits for anybody else.
//
// Bytes: the weight once for 16 rows of x; x as fragments by each block, from L2: 4 bytes an input and row (int8: 2).
#ifndef KERNELS_CUDA_LINEAR_CUH_
#define KERNELS_CUDA_LINEAR_CUH_

#include "kernels/cuda/fragments.cuh"

namespace dejavu::cuda {

constexpr int kSlotWindows = 4;  // of 16 outputs, that lie in a slot of a ring
constexpr int kSlotVectors = 2 * kSlotWindows * 32;
constexpr int kTokenStride = 20;  // of the warps' sums: 16 outputs and no bank conflicts
static_assert(kLinearRingBytes == kWarps * kLinearSlots * kSlotVectors * 16);

// What a block knows of its outputs, in shared memory.
struct LinearOutputs {
  int32_t ids[kMostLinearOutputs];
  float bias[kMostLinearOutputs], scale[kMostLinearOutputs];
};
constexpr int kLinearSums = kWarps * 2 * kLinearRows * kTokenStride;  // words

// kGroups: of 8 rows of x. kTiles: of 16 outputs, of a pass.
template <typename T, int kGroups, int kTiles>
class LinearBlock {
 public:
  DJ_DEVICE LinearBlock(const LinearParams& p, const OutputRows& w, bool selected, Vector16* ring,
                        LinearOutputs* outputs, typename T::Sum* sums)
      : p_(p),
        w_(w),
        listed_(selected && p.selected.list != nullptr),
        selected_(selected),
        first_row_(static_cast<int>(blockIdx.x) * kLinearRows),
        x_(w.x, static_cast<int>(blockIdx.x), p.rows, p.inputs),
        range_(DivideUp(x_.windows(), kWarps)),
        first_(Warp() * range_),
        end_(Min(first_ + range_, x_.windows())),
        steps_(DivideUp(Max(end_ - first_, 0), kSlotWindows)),
        ring_(ring + Warp() * kLinearSlots * kSlotVectors + Lane()),
        outputs_(outputs),
        sums_(sums) {}

  // Before GridWait: what can be asked for by then.
  DJ_DEVICE void Begin(int block, int blocks) {
    if (!listed_ || p_.list_early) Fill(block, blocks);
  }

  DJ_DEVICE void Run(int block, int blocks) {
    if (listed_ && !p_.list_early) Fill(block, blocks);
    for (int pass = 0; pass < passes_; ++pass) {
      const int first = pass * kTiles, tiles = Min(kTiles, tiles_ - first);
      Sums sums[kTiles] = {};
      for (int step = 0; step < steps_; ++step) {
        Vector16 x[kSlotWindows][2][kGroups];
        LoadX(step, x);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (t >= tiles) continue;
          CopyAsyncWait<kLinearSlots - 1>();
          Multiply(x, sums[t]);
          Issue();
          if (++slot_ == kLinearSlots) slot_ = 0;
        }
      }
      Join(first, tiles, sums);
    }
  }

 private:
  using Weight = typename T::Weight;
  using Sum = typename T::Sum;
  struct Sums {
    Sum d[kGroups][T::kPlanes][4];
  };
  static constexpr int kWindow = kFourLanes * T::kPiece;
  static constexpr int kRows = 8 * kGroups;
  static constexpr int kTileSums = kWarps * T::kPlanes * kRows * kTokenStride;
  static constexpr int kJoined = kLinearSums / kTileSums;  // tiles at once

  // Finds the block's outputs and fills the ring.
  DJ_DEVICE void Fill(int block, int blocks) {
    const int64_t count = listed_ ? int64_t{LoadOld(p_.selected.count)} * p_.group : w_.outputs;
    const int begin = static_cast<int>(count * block / blocks);
    count_ = static_cast<int>(count * (block + 1) / blocks) - begin;
    tiles_ = DivideUp(count_, kLinearOutputs);
    passes_ = DivideUp(tiles_, kTiles);
    for (int i = Thread(); i < count_; i += kBlockThreads) {
      const int place = begin + i;
      const int id = !listed_        ? place
                     : p_.group == 1 ? LoadOld(p_.selected.list + place)
                                     : LoadOld(p_.selected.list + place / p_.group) * p_.group + place % p_.group;
      outputs_->ids[i] = id;
    }
    __syncthreads();
    for (int slot = 0; slot < kLinearSlots; ++slot) Issue();
    for (int i = Thread(); i < count_; i += kBlockThreads) {  // wanted at the end alone
      const int id = outputs_->ids[i];
      outputs_->bias[i] = w_.bias != nullptr ? LoadConstant(w_.bias + id) : 0.0f;
      if (T::kQuantizes) outputs_->scale[i] = LoadConstant(w_.scale + id);
    }
  }

  // Asks for the next slot of the ring: inputs of a step for a tile. Tiles follow each other within a step, steps
  // within a pass. What is beyond the outputs or the warp's range becomes zero.
  DJ_DEVICE void Issue() {
    const int first = next_pass_ * kTiles;
    if (next_pass_ < passes_ && steps_ > 0) {
      Vector16* const slot = ring_ + next_slot_ * kSlotVectors;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = (first + next_tile_) * kLinearOutputs + Lane() / kFourLanes + 8 * half;
        const Weight* row = static_cast<const Weight*>(w_.weight) + outputs_->ids[Min(place, count_ - 1)] * w_.stride;
#pragma unroll
        for (int s = 0; s < kSlotWindows; ++s) {
          const int window = first_ + next_step_ * kSlotWindows + s;
          const int k = window * kWindow + Lane() % kFourLanes * T::kPiece;
          Copy(slot + (2 * s + half) * 32, row + k, place < count_ && window < end_ ? p_.inputs - k : 0);
        }
      }
      if (++next_tile_ == Min(kTiles, tiles_ - first)) {
        next_tile_ = 0;
        if (++next_step_ == steps_) {
          next_step_ = 0;
          ++next_pass_;
        }
      }
      if (++next_slot_ == kLinearSlots) next_slot_ = 0;
    }
    CopyAsyncCommit();
  }

  // 16 bytes of which `left` elements are there.
  DJ_DEVICE void Copy(Vector16* to, const Weight* from, int left) const {
    if (w_.vectors && (left <= 0 || left >= T::kPiece)) {
      CopyAsync16(to, left > 0 ? from : w_.weight, left > 0);
    } else {
      *to = LoadPart(from, left);
    }
  }

  // This lane's fragments of a step; zeros beyond the rows and the warp's range.
  DJ_DEVICE void LoadX(int step, Vector16 (&x)[kSlotWindows][2][kGroups]) const {
#pragma unroll
    for (int s = 0; s < kSlotWindows; ++s) {
      const int window = first_ + step * kSlotWindows + s;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const bool there = window < end_ && Lane() / kFourLanes + 8 * g < x_.rows();
          x[s][part][g] = {{0, 0, 0, 0}};
          if (there) x[s][part][g] = LoadVector(x_.At(window, part, 8 * g) + Lane());
        }
      }
    }
  }

  DJ_DEVICE void Multiply(const Vector16 (&x)[kSlotWindows][2][kGroups], Sums& sums) const {
    const Vector16* slot = ring_ + slot_ * kSlotVectors;
#pragma unroll
    for (int s = 0; s < kSlotWindows; ++s) {
      const Vector16 first = slot[2 * s * 32], second = slot[(2 * s + 1) * 32];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            const uint32_t a[4] = {first.w[i], second.w[i], first.w[i + 1], second.w[i + 1]};
            const uint32_t b[2] = {x[s][part][g].w[i], x[s][part][g].w[i + 1]};
            T::Multiply(a, b, part, sums.d[g]);
          }
        }
      }
    }
  }

  // Adds the warps' sums and stores the tiles, kJoined of them at a time.
  DJ_DEVICE void Join(int first, int tiles, const Sums (&sums)[kTiles]) {
#pragma unroll
    for (int begin = 0; begin < kTiles; begin += kJoined) {
      if (begin >= tiles) continue;
      __syncthreads();  // sums_ has been read
#pragma unroll
      for (int j = 0; j < kJoined && begin + j < kTiles; ++j) {
        if (begin + j < tiles) Spread(sums[begin + j], sums_ + j * kTileSums + Warp() * (kTileSums / kWarps));
      }
      __syncthreads();
      for (int i = Thread(); i < kJoined * kRows * kLinearOutputs; i += kBlockThreads) {
        const int place = i % kLinearOutputs, r = i / kLinearOutputs % kRows, j = i / (kLinearOutputs * kRows);
        const int output = (first + begin + j) * kLinearOutputs + place;
        if (begin + j >= tiles || r >= x_.rows() || output >= count_) continue;
        Store(output, r, Total(sums_ + j * kTileSums + r * kTokenStride + place, r, output));
      }
    }
  }

  // This warp's sums to [planes][kRows][kTokenStride].
  static DJ_DEVICE void Spread(const Sums& sums, Sum* to) {
    const int place = Lane() / kFourLanes, row = Lane() % kFourLanes * 2;
#pragma unroll
    for (int plane = 0; plane < T::kPlanes; ++plane) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[(plane * kRows + 8 * g + row + i % 2) * kTokenStride + place + i / 2 * 8] = sums.d[g][plane][i];
        }
      }
    }
  }

  DJ_DEVICE float Total(const float* sums, int, int) const {
    constexpr int kWarpSums = kTileSums / kWarps;
    float total = sums[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += sums[w * kWarpSums];
    return total;
  }
  DJ_DEVICE float Total(const int32_t* sums, int r, int output) const {
    constexpr int kPlane = kRows * kTokenStride;
    int32_t high = 0, low = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      high += sums[2 * w * kPlane];
      low += sums[(2 * w + 1) * kPlane];
    }
    return static_cast<float>(int64_t{high} * 128 + low) * (w_.x.scales[first_row_ + r] * outputs_->scale[output]);
  }

  DJ_DEVICE void Store(int output, int r, float y) const {
    const int row = first_row_ + r, id = outputs_->ids[output];
    if (w_.bias != nullptr) y += outputs_->bias[output];
    if (p_.relu && y < 0.0f) y = 0.0f;  // NaN stays
    if (selected_ && IsStrict(p_.selected, row) && !Bit(Row(p_.selected.masks, row), id)) y = 0.0f;
    Row(w_.y, row)[id] = y;
  }

  const LinearParams& p_;
  const OutputRows& w_;
  const bool listed_, selected_;  // selected: strict rows leave out what they did not select
  const int first_row_;
  const FragmentsOf<T> x_;
  const int range_, first_, end_;  // windows of a warp, and this one's
  const int steps_;
  Vector16* const ring_;  // this lane's first 16 bytes
  LinearOutputs* const outputs_;
  Sum* const sums_;  // [kJoined][kWarps][planes][kRows][kTokenStride]

  int count_ = 0, tiles_ = 0, passes_ = 0;                             // of the block
  int slot_ = 0;                                                       // that is multiplied next
  int next_slot_ = 0, next_tile_ = 0, next_step_ = 0, next_pass_ = 0;  // that are asked for next
};

template <typename T, int kGroups, int kTiles>
DJ_DEVICE void LinearPart(const LinearParams& p, const OutputRows& w, bool selected, int block, int blocks,
                          LinearOutputs* outputs, int32_t* sums) {
  DJ_DYNAMIC_SHARED(Vector16, ring);
  LinearBlock<T, kGroups, kTiles> part(p, w, selected, ring, outputs, reinterpret_cast<typename T::Sum*>(sums));
  part.Begin(block, blocks);
  GridWait();
  GridLaunchDependents();
  if (blockIdx.y == 0 && blockIdx.x == 0) {
    for (int i = Thread(); i < p.cleared_count; i += kBlockThreads) p.cleared[i] = 0;
  }
  part.Run(block, blocks);
}

// The first ride_blocks do `ride`. An int8 tile has twice the sums.
template <typename T, int kGroups, int kTiles>
DJ_DEVICE void Linear(const LinearParams& p) {
  DJ_SHARED(LinearOutputs, outputs, 1);
  DJ_SHARED(int32_t, sums, kLinearSums);
  const int block = static_cast<int>(blockIdx.y), blocks = static_cast<int>(gridDim.y);
  if (block < p.ride_blocks) {
    LinearPart<Int8Terms, kGroups, 4>(p, p.ride, false, block, p.ride_blocks, outputs, sums);
  } else {
    LinearPart<T, kGroups, kTiles>(p, p.w, true, block - p.ride_blocks, blocks - p.ride_blocks, outputs, sums);
  }
}

DJ_WIDE_KERNEL(LinearF16x8, LinearParams, kBlockThreads) { Linear<HalfTerms<Half>, 1, 14>(p); }
DJ_WIDE_KERNEL(LinearF16x16, LinearParams, kBlockThreads) { Linear<HalfTerms<Half>, 2, 12>(p); }
DJ_WIDE_KERNEL(LinearBF16x8, LinearParams, kBlockThreads) { Linear<HalfTerms<BFloat16>, 1, 14>(p); }
DJ_WIDE_KERNEL(LinearBF16x16, LinearParams, kBlockThreads) { Linear<HalfTerms<BFloat16>, 2, 12>(p); }
DJ_WIDE_KERNEL(LinearI8x8, LinearParams, kBlockThreads) { Linear<Int8Terms, 1, 12>(p); }
DJ_WIDE_KERNEL(LinearI8x16, LinearParams, kBlockThreads) { Linear<Int8Terms, 2, 6>(p); }

// float32 weights, without tensor cores or ring: right, and slow. A warp has an output, its lanes share the inputs.
DJ_KERNEL(LinearF32, LinearParams, kBlockThreads) {
  constexpr int kPiece = 4;
  GridWait();
  GridLaunchDependents();
  const int first_row = static_cast<int>(blockIdx.x) * kLinearRows, rows = Min(kLinearRows, p.rows - first_row);
  const bool listed = p.selected.list != nullptr;
  const int count = listed ? p.selected.count[0] * p.group : p.w.outputs;
  if (blockIdx.y == 0 && blockIdx.x == 0) {
    for (int i = Thread(); i < p.cleared_count; i += kBlockThreads) p.cleared[i] = 0;
  }
  for (int i = static_cast<int>(blockIdx.y) * kWarps + Warp(); i < count; i += static_cast<int>(gridDim.y) * kWarps) {
    const int id = listed ? p.selected.list[i / p.group] * p.group + i % p.group : i;
    const float* weight = static_cast<const float*>(p.w.weight) + id * p.w.stride;
    float sums[kLinearRows] = {};
    for (int k = Lane() * kPiece; k < p.inputs; k += 32 * kPiece) {
      const int left = p.inputs - k;
      const Vector16 w = p.w.vectors && left >= kPiece ? LoadStream(weight + k) : LoadPart(weight + k, left);
#pragma unroll
      for (int r = 0; r < kLinearRows; ++r) {
        if (r >= rows) continue;
        const float* x = Row(p.x, first_row + r) + k;
#pragma unroll
        for (int e = 0; e < kPiece; ++e) {
          if (e < left) sums[r] = fmaf(x[e], __uint_as_float(w.w[e]), sums[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kLinearRows; ++r) {
      float y = sums[r];
      for (int step = 16; step > 0; step /= 2) y += __shfl_xor_sync(kAllLanes, y, step);
      const int row = first_row + r;
      if (r >= rows || Lane() != 0) continue;
      if (p.w.bias != nullptr) y += p.w.bias[id];
      if (p.relu && y < 0.0f) y = 0.0f;  // NaN stays
      if (IsStrict(p.selected, row) && !Bit(Row(p.selected.masks, row), id)) y = 0.0f;
      Row(p.w.y, row)[id] = y;
    }
  }
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_LINEAR_CUH_
