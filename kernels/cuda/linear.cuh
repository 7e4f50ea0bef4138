// y = W x + b where an output is a row of the weight, for up to 16 rows of x, at the speed at which the weight is read.
//
// A tile is 16 weight rows, and a block's warps share its inputs: each has a fixed range of them, a whole number of
// windows, that depends on the number of inputs alone. A window is the inputs of 16 bytes for each of four lanes. Lane
// l reads those of weight rows l / 4 and l / 4 + 8, and the same inputs of row l / 4 of x from shared memory. As both
// sides number the inputs alike, each 16 bytes feed two mma as they are, whatever the order in which mma sees the
// inputs. The warps' sums are added in order. So a row's sums have one order, whoever shares its step and however many
// blocks run.
//
// x stays float32: it is split into two halves that mma multiplies one after the other, high + low, which leaves 21
// bits (bfloat16: 16). With int8 weights x is rounded to 14 bits and a sign, by row, as on the CPU, and split into two
// int8; the sums are exact, and the products those of the CPU. float32 weights are multiplied without mma.
//
// Bytes: the weight once for 16 rows of x; x of each block from L2. Few rows of x lie whole in shared memory; for more
// (Chunked), a chunk of each warp's range at a time passes several tiles.
#ifndef KERNELS_CUDA_LINEAR_CUH_
#define KERNELS_CUDA_LINEAR_CUH_

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/quantize.cuh"

namespace dejavu::cuda {

constexpr int kFourLanes = 4;      // that read one weight row's part of a window
constexpr int kLoadsInFlight = 8;  // of a lane
constexpr int kTokenStride = 20;   // of the warps' sums: 16 outputs and no bank conflicts

// What the kernel does for a type of weights: how a lane's inputs of a window, x[kPiece], lie in shared memory, and how
// they are multiplied with those of two weight rows.
//   Sums          a lane's share of a tile's sums, zero at first
//   Place(x, to)  `to` is the lane's 16 bytes, others of it lie `plane` of them apart
template <typename W>
struct HalfTerms {
  using Weight = W;
  using Sum = float;
  static constexpr int kPiece = 8;
  static constexpr int kPlanes = 1;  // of sums
  static constexpr bool kQuantizes = false;

  struct Sums {
    float d[2][4];  // of the rows 0 ... 7 of x, and of 8 ... 15
  };

  static DJ_DEVICE void Place(const float (&x)[kPiece], float, Vector16* to, int plane) {
    Vector16 high, low;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint16_t h[2], l[2];
      Split(x[2 * i], h[0], l[0], W());
      Split(x[2 * i + 1], h[1], l[1], W());
      high.w[i] = h[0] | static_cast<uint32_t>(h[1]) << 16;
      low.w[i] = l[0] | static_cast<uint32_t>(l[1]) << 16;
    }
    to[0] = high;
    to[plane] = low;
  }

  static DJ_DEVICE void Mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) { MmaF16(d, a, b); }
  static DJ_DEVICE void Mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
    MmaBF16(d, a, b);
  }
  static DJ_DEVICE void Multiply(const uint32_t (&a)[4], const uint32_t (&b)[2], int group, int, Sums& sums) {
    Mma(sums.d[group], a, b, W());
  }
  static DJ_DEVICE float SumAt(const Sums& sums, int group, int, int i) { return sums.d[group][i]; }
};

struct Int8Terms {
  using Weight = int8_t;
  using Sum = int32_t;
  static constexpr int kPiece = 16;
  static constexpr int kPlanes = 2;
  static constexpr bool kQuantizes = true;

  struct Sums {
    int32_t d[2][2][4];  // [rows 0 ... 7, 8 ... 15 of x][high, low]
  };

  // q = 128 * high + low.
  static DJ_DEVICE void Place(const float (&x)[kPiece], float inverse, Vector16* to, int plane) {
    Vector16 high = {{0, 0, 0, 0}}, low = {{0, 0, 0, 0}};
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      const int q = Quantize(x[i], inverse), at = i % 4 * 8;
      high.w[i / 4] |= static_cast<uint32_t>(q >> 7 & 0xFF) << at;
      low.w[i / 4] |= static_cast<uint32_t>(q & 0x7F) << at;
    }
    to[0] = high;
    to[plane] = low;
  }

  static DJ_DEVICE void Multiply(const uint32_t (&a)[4], const uint32_t (&b)[2], int group, int part, Sums& sums) {
    MmaS8(sums.d[group][part], a, b);
  }
  static DJ_DEVICE int32_t SumAt(const Sums& sums, int group, int plane, int i) { return sums.d[group][plane][i]; }
};

// The products of one lane with all rows of x; four lanes share a weight row.
struct FloatTerms {
  using Weight = float;
  using Sum = float;
  static constexpr int kPiece = 4;
  static constexpr int kPlanes = 1;
  static constexpr bool kQuantizes = false;

  struct Sums {
    float d[2][kLinearRows];  // of weight rows l / 4 and l / 4 + 8
  };

  static DJ_DEVICE void Place(const float (&x)[kPiece], float, Vector16* to, int) {
    Vector16 v;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) v.w[i] = __float_as_uint(x[i]);
    *to = v;
  }

  static DJ_DEVICE void MultiplyAll(const Vector16& first, const Vector16& second, const Vector16* x, int rows,
                                    Sums& sums) {
#pragma unroll
    for (int r = 0; r < kLinearRows; ++r) {
      if (r >= rows) continue;
      const Vector16 v = x[r * kFourLanes + Lane() % kFourLanes];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        sums.d[0][r] = fmaf(__uint_as_float(first.w[i]), __uint_as_float(v.w[i]), sums.d[0][r]);
        sums.d[1][r] = fmaf(__uint_as_float(second.w[i]), __uint_as_float(v.w[i]), sums.d[1][r]);
      }
    }
  }
};

// The sums of tiles += those of a window; weights[tile] are its rows l / 4 and l / 4 + 8. `x` is the window's: [high,
// low] [rows][4 lanes], of float32 [rows][4 lanes].
template <typename T, int kTiles>
DJ_DEVICE void MultiplyWindow(const Vector16 (&weights)[kTiles][2], const Vector16* x, int rows,
                              typename T::Sums (&sums)[kTiles]) {
  if constexpr (T::kPiece == 4) {
    T::MultiplyAll(weights[0][0], weights[0][1], x, rows, sums[0]);
    return;
  } else {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        if (group == 1 && rows <= 8) continue;
        Vector16 v = {{0, 0, 0, 0}};
        if (Lane() / kFourLanes + 8 * group < rows) v = x[(part * rows + 8 * group) * kFourLanes + Lane()];
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t b[2] = {v.w[i], v.w[i + 1]};
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            const Vector16 &first = weights[t][0], &second = weights[t][1];
            const uint32_t a[4] = {first.w[i], second.w[i], first.w[i + 1], second.w[i + 1]};
            T::Multiply(a, b, group, part, sums[t]);
          }
        }
      }
    }
  }
}

template <typename T, int kTiles>
class LinearBlock {
 public:
  DJ_DEVICE LinearBlock(const LinearParams& p, const OutputRows& w, bool selected, Vector16* x, typename T::Sum* sums,
                        float* scales)
      : p_(p),
        w_(w),
        selected_(selected),
        first_row_(static_cast<int>(blockIdx.x) * kLinearRows),
        rows_(Min(kLinearRows, p.rows - first_row_)),
        count_(!selected                    ? w.outputs
               : p.selected.list == nullptr ? w.outputs
                                            : p.selected.count[0] * p.group),
        range_(DivideUp(DivideUp(p.inputs, kWindow), kWarps)),
        x_(x),
        sums_(sums),
        scales_(scales) {}

  // Every `blocks`-th pass from `block` on; a pass is kTiles tiles.
  DJ_DEVICE void Run(int block, int blocks) {
    const int tiles = DivideUp(count_, kLinearOutputs);
    if (block * kTiles >= tiles) return;
    if (T::kQuantizes) FindScales();
    const bool whole = w_.chunk >= range_;
    if (whole) Stage(0);
    for (int first = block * kTiles; first < tiles; first += blocks * kTiles) {
      typename T::Sums sums[kTiles] = {};
      for (int start = 0; start < range_; start += w_.chunk) {
        if (!whole) Stage(start);
        Accumulate(first, start, sums);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (first + t < tiles) Finish(first + t, sums[t]);
      }
    }
  }

 private:
  using Weight = typename T::Weight;
  static constexpr int kWindow = kFourLanes * T::kPiece;
  static constexpr int kWindowVectors = kLinearXBytes / 16;     // of shared memory for a row of x
  static constexpr int kAhead = kLoadsInFlight / (2 * kTiles);  // windows that are read before the first is used

  DJ_DEVICE int Output(int i) const {
    if (!selected_ || p_.selected.list == nullptr) return i;
    return p_.group == 1 ? p_.selected.list[i] : p_.selected.list[i / p_.group] * p_.group + i % p_.group;
  }

  // Of each row of x: what its integers are multiplied with, and the inverse.
  DJ_DEVICE void FindScales() {
    for (int r = Warp(); r < rows_; r += kWarps) {
      const float scale = QuantizedScale(Row(p_.x, first_row_ + r), p_.inputs);
      if (Lane() == 0) scales_[r] = scale;
    }
    __syncthreads();
  }

  // Puts windows start ... start + chunk of each warp's range into shared memory, window by window.
  DJ_DEVICE void Stage(int start) {
    __syncthreads();
    const int windows = Min(w_.chunk, range_ - start), pieces = rows_ * kFourLanes;
    for (int i = Thread(); i < kWarps * windows * pieces; i += kBlockThreads) {
      const int piece = i % pieces, slot = i / pieces, row = piece / kFourLanes;
      const int k = ((slot / windows) * range_ + start + slot % windows) * kWindow + piece % kFourLanes * T::kPiece;
      const float* from = Row(p_.x, first_row_ + row) + k;
      float x[T::kPiece];
      if (p_.x_vectors && k + T::kPiece <= p_.inputs) {
#pragma unroll
        for (int j = 0; j < T::kPiece; j += 4) {
          const Vector16 v = *reinterpret_cast<const Vector16*>(from + j);
#pragma unroll
          for (int e = 0; e < 4; ++e) x[j + e] = __uint_as_float(v.w[e]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < T::kPiece; ++j) x[j] = k + j < p_.inputs ? from[j] : 0.0f;
      }
      T::Place(x, T::kQuantizes ? QuantizedInverse(scales_[row]) : 1.0f,
               x_ + (slot / windows * w_.chunk + slot % windows) * kWindowVectors * rows_ + piece, pieces);
    }
    __syncthreads();
  }

  // What the windows of this warp that lie in shared memory add to the tiles from `tile` on.
  DJ_DEVICE void Accumulate(int tile, int start, typename T::Sums (&sums)[kTiles]) {
    const int k = Lane() % kFourLanes * T::kPiece;
    const Weight* weight = static_cast<const Weight*>(w_.weight) + k;
    uint32_t rows[kTiles][2];  // where they begin: half the registers of pointers
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {  // rows beyond the last are read as the last and not stored
      const int place = (tile + i / 2) * kLinearOutputs + Lane() / kFourLanes + i % 2 * 8;
      rows[i / 2][i % 2] = static_cast<uint32_t>(Output(Min(place, count_ - 1)) * w_.stride);
    }
    const int first = Warp() * range_ + start;
    const int end = Min(first + Min(w_.chunk, range_ - start), DivideUp(p_.inputs, kWindow));
    const int whole = w_.vectors ? Min(end, p_.inputs / kWindow) : 0;
    const Vector16* x = x_ + Warp() * w_.chunk * kWindowVectors * rows_;
    int window = first;
    for (; window + kAhead <= whole; window += kAhead) {
      Vector16 v[kAhead][kTiles][2];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kTiles; ++j) {
          v[i][j / 2][j % 2] = LoadStream(weight + (window + i) * kWindow + rows[j / 2][j % 2]);
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i, x += kWindowVectors * rows_) MultiplyWindow<T>(v[i], x, rows_, sums);
    }
    for (; window < end; ++window, x += kWindowVectors * rows_) {
      const int at = window * kWindow;
      Vector16 v[kTiles][2];
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        v[j / 2][j % 2] = Load(weight + at + rows[j / 2][j % 2], window < whole, p_.inputs - at - k);
      }
      MultiplyWindow<T>(v, x, rows_, sums);
    }
  }

  static DJ_DEVICE Vector16 Load(const Weight* from, bool whole, int left) {
    return whole ? LoadStream(from) : LoadPart(from, left);
  }

  // Adds the warps' sums and stores the tile: a thread an output of a row of x.
  DJ_DEVICE void Finish(int tile, const typename T::Sums& sums) {
    __syncthreads();
    Spread(sums, sums_ + Warp() * T::kPlanes * kLinearRows * kTokenStride);
    __syncthreads();
    const int place = Thread() % kLinearOutputs, r = Thread() / kLinearOutputs;
    const int i = tile * kLinearOutputs + place;
    if (r >= rows_ || i >= count_) return;
    const int output = Output(i), row = first_row_ + r;
    float y = Total(sums_ + r * kTokenStride + place, r, output);
    if (w_.bias != nullptr) y += w_.bias[output];
    if (p_.relu && y < 0.0f) y = 0.0f;  // NaN stays
    if (selected_ && IsStrict(p_.selected, row) && !Bit(Row(p_.selected.masks, row), output)) y = 0.0f;
    Row(w_.y, row)[output] = y;
  }

  // This warp's sums to [planes][kLinearRows][kTokenStride].
  static DJ_DEVICE void Spread(const typename T::Sums& sums, typename T::Sum* to) {
    const int place = Lane() / kFourLanes, row = Lane() % kFourLanes * 2;
    if constexpr (T::kPiece == 4) {
      for (int r = 0; r < kLinearRows; ++r) {  // four lanes have a share each
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float sum = sums.d[i][r];
          sum += __shfl_xor_sync(kAllLanes, sum, 1);
          sum += __shfl_xor_sync(kAllLanes, sum, 2);
          if (Lane() % kFourLanes == 0) to[r * kTokenStride + place + 8 * i] = sum;
        }
      }
    } else {
#pragma unroll
      for (int plane = 0; plane < T::kPlanes; ++plane) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int group = i / 4, j = i % 4;
          to[(plane * kLinearRows + group * 8 + row + j % 2) * kTokenStride + place + j / 2 * 8] =
              T::SumAt(sums, group, plane, j);
        }
      }
    }
  }

  DJ_DEVICE float Total(const float* sums, int, int) const {
    constexpr int kWarpStride = kLinearRows * kTokenStride;
    float total = sums[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += sums[w * kWarpStride];
    return total;
  }
  DJ_DEVICE float Total(const int32_t* sums, int r, int output) const {
    constexpr int kPlane = kLinearRows * kTokenStride;
    int32_t high = 0, low = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      high += sums[2 * w * kPlane];
      low += sums[(2 * w + 1) * kPlane];
    }
    return static_cast<float>(int64_t{high} * 128 + low) * (scales_[r] * w_.scale[output]);
  }

  const LinearParams& p_;
  const OutputRows& w_;
  const bool selected_;
  const int first_row_, rows_;
  const int count_;              // outputs
  const int range_;              // windows of a warp
  Vector16* const x_;            // [kWarps * chunk][kWindowVectors * rows]
  typename T::Sum* const sums_;  // [kWarps][planes][kLinearRows][kTokenStride]
  float* const scales_;          // [kLinearRows]
};

// Tiles of a pass, of `w` and of `ride`.
template <typename T, int kTiles, int kRideTiles>
DJ_DEVICE void Linear(const LinearParams& p) {
  DJ_DYNAMIC_SHARED(Vector16, x);
  DJ_SHARED(int32_t, sums, kWarps * 2 * kLinearRows * kTokenStride);
  DJ_SHARED(float, scales, kLinearRows);
  GridWait();
  GridLaunchDependents();
  const int block = static_cast<int>(blockIdx.y), blocks = static_cast<int>(gridDim.y);
  if (block == 0 && blockIdx.x == 0) {
    for (int i = Thread(); i < p.cleared_count; i += kBlockThreads) p.cleared[i] = 0;
  }
  if (block < p.ride_blocks) {
    LinearBlock<Int8Terms, kRideTiles>(p, p.ride, false, x, sums, scales).Run(block, p.ride_blocks);
  } else {
    LinearBlock<T, kTiles>(p, p.w, true, x, reinterpret_cast<typename T::Sum*>(sums), scales)
        .Run(block - p.ride_blocks, blocks - p.ride_blocks);
  }
}

DJ_KERNEL(LinearF32, LinearParams, kBlockThreads) { Linear<FloatTerms, 1, 1>(p); }
DJ_KERNEL(LinearF16, LinearParams, kBlockThreads) { Linear<HalfTerms<Half>, 1, 1>(p); }
DJ_KERNEL(LinearBF16, LinearParams, kBlockThreads) { Linear<HalfTerms<BFloat16>, 1, 1>(p); }
DJ_KERNEL(LinearI8, LinearParams, kBlockThreads) { Linear<Int8Terms, 1, 1>(p); }
DJ_KERNEL(LinearF16Chunked, LinearParams, kBlockThreads) {
  Linear<HalfTerms<Half>, kChunkedTiles, kChunkedInt8Tiles>(p);
}
DJ_KERNEL(LinearBF16Chunked, LinearParams, kBlockThreads) {
  Linear<HalfTerms<BFloat16>, kChunkedTiles, kChunkedInt8Tiles>(p);
}
DJ_KERNEL(LinearI8Chunked, LinearParams, kBlockThreads) { Linear<Int8Terms, kChunkedInt8Tiles, kChunkedInt8Tiles>(p); }

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_LINEAR_CUH_
