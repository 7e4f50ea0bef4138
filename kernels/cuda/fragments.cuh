// Rows of x in the form in which tensor cores multiply them: split once by whoever makes x, not again by every block
// that multiplies with it.
//
// A window is the inputs of 64 bytes of a weight row: 16 bytes for each of four lanes. Lane l of a warp has those of
// weight rows l / 4 and l / 4 + 8, and here the same inputs of row l / 4 of x. As both sides number the inputs alike,
// each 16 bytes feed two mma as they are, whatever the order in which mma sees the inputs.
//
// x is split into two halves that mma multiplies one after the other, high + low, which leaves 21 bits (bfloat16: 16).
// With int8 weights x is rounded to 14 bits and a sign, by row, as on the CPU, and split into two int8; the sums are
// exact, and the products those of the CPU.
#ifndef KERNELS_CUDA_FRAGMENTS_CUH_
#define KERNELS_CUDA_FRAGMENTS_CUH_

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/quantize.cuh"

namespace dejavu::cuda {

constexpr int kFourLanes = 4;  // that read one row's part of a window

// What is done for a type of weights: how a lane's inputs of a window, x[kPiece], lie in memory, and how they are
// multiplied with those of two weight rows.
//   Sums          a lane's share of a tile's sums, zero at first
//   Place(x, to)  `to` is the lane's 16 bytes of the high part, those of the low part lie `plane` of them further
template <typename W>
struct HalfTerms {
  using Weight = W;
  using Sum = float;
  static constexpr int kPiece = 8;
  static constexpr int kPlanes = 1;  // of sums
  static constexpr bool kQuantizes = false;

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
  static DJ_DEVICE void Multiply(const uint32_t (&a)[4], const uint32_t (&b)[2], int, float (&d)[kPlanes][4]) {
    Mma(d[0], a, b, W());
  }
};

struct Int8Terms {
  using Weight = int8_t;
  using Sum = int32_t;
  static constexpr int kPiece = 16;
  static constexpr int kPlanes = 2;  // high, low
  static constexpr bool kQuantizes = true;

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

  static DJ_DEVICE void Multiply(const uint32_t (&a)[4], const uint32_t (&b)[2], int part, int32_t (&d)[kPlanes][4]) {
    MmaS8(d[part], a, b);
  }
};

// Where the rows of a group of kLinearRows lie: [windows][high, low][rows of the group][4 lanes] of 16 bytes.
template <typename T>
class FragmentsOf {
 public:
  DJ_DEVICE FragmentsOf(const Fragments& f, int group, int rows, int inputs)
      : windows_(DivideUp(inputs, kWindow)),
        rows_(Min(kLinearRows, rows - group * kLinearRows)),
        pieces_(static_cast<Vector16*>(f.pieces) + int64_t{group} * kLinearRows * windows_ * 2 * kFourLanes) {}

  static constexpr int kWindow = kFourLanes * T::kPiece;  // inputs
  DJ_DEVICE int windows() const { return windows_; }
  DJ_DEVICE int rows() const { return rows_; }
  DJ_DEVICE int plane() const { return rows_ * kFourLanes; }
  DJ_DEVICE Vector16* At(int window, int part, int row) const {
    return pieces_ + ((int64_t{window} * 2 + part) * rows_ + row) * kFourLanes;
  }

 private:
  const int windows_, rows_;
  Vector16* const pieces_;
};

// Puts row `row` of `rows`, which lies in shared memory, into its place. All threads.
template <typename T>
DJ_DEVICE void StoreFragments(const Fragments& f, int row, int rows, const float* x, int inputs, float inverse) {
  const FragmentsOf<T> of(f, row / kLinearRows, rows, inputs);
  for (int i = Thread(); i < of.windows() * kFourLanes; i += kBlockThreads) {
    float piece[T::kPiece];
#pragma unroll
    for (int j = 0; j < T::kPiece; ++j) piece[j] = i * T::kPiece + j < inputs ? x[i * T::kPiece + j] : 0.0f;
    T::Place(piece, inverse, of.At(i / kFourLanes, 0, row % kLinearRows) + i % kFourLanes, of.plane());
  }
}

// In the forms that are wanted. `most`: the largest magnitude of x, as QuantizedScale has it.
DJ_DEVICE void StoreAllFragments(const RowFragments& to, int row, int rows, const float* x, int inputs, int most) {
  if (to.halves.pieces != nullptr) {
    if (to.halves_type == kF16) {
      StoreFragments<HalfTerms<Half>>(to.halves, row, rows, x, inputs, 1.0f);
    } else {
      StoreFragments<HalfTerms<BFloat16>>(to.halves, row, rows, x, inputs, 1.0f);
    }
  }
  if (to.integers.pieces == nullptr) return;
  const float scale = QuantizedScaleOf(most);
  if (Thread() == 0) to.integers.scales[row] = scale;
  StoreFragments<Int8Terms>(to.integers, row, rows, x, inputs, QuantizedInverse(scale));
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_FRAGMENTS_CUH_
