// Which outputs each row selects, and the list of what any row selected (Backend::Select). The sums are integers, and
// what they are compared with is computed as on the CPU: the bits are the CPU's.
//
// A block does some columns for a group of rows: its warps share the coordinates, lanes have four columns each. The
// last block makes the list from the masks: a prefix sum over their words, so that it is ascending.
//
// Bytes: b up to the largest rank of the step, once for each group of rows.
#ifndef KERNELS_CUDA_SELECT_CUH_
#define KERNELS_CUDA_SELECT_CUH_

#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/quantize.cuh"

namespace dejavu::cuda {

constexpr int kSelectEverything = -1;
constexpr int kCoordinates = 1024;  // of a chunk: their products with int8 add up in int32

template <int kRows>
class SelectBlock {
 public:
  // `q`, shared: [kCoordinates][kRows]; `sums`, shared: [kWarps][kRows][kSelectColumns].
  DJ_DEVICE SelectBlock(const SelectParams& p, int block, int16_t* q, int32_t* sums, float* scales, int32_t* ranks)
      : p_(p),
        groups_(DivideUp(p.rows, kRows)),
        first_row_(block % groups_ * kRows),
        rows_(Min(kRows, p.rows - first_row_)),
        column_(block / groups_ * kSelectColumns),
        q_(q),
        sums_(sums),
        scales_(scales),
        ranks_(ranks) {}

  DJ_DEVICE void Run() {
    FindScales();
    int most = 0;
    for (int r = 0; r < rows_; ++r) most = Max(most, ranks_[r]);
    float totals[kItems] = {};
    for (int first = 0; first < most; first += kCoordinates) {
      const int n = Min(kCoordinates, most - first);
      Stage(first, n);
      Accumulate(first, n);
#pragma unroll
      for (int i = 0; i < kItems; ++i) totals[i] += static_cast<float>(SumOf(Thread() + i * kBlockThreads));
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) Compare(Thread() + i * kBlockThreads, totals[i]);
  }

 private:
  // What the threads finish: an item is a column of a row.
  static constexpr int kItems = (kRows * kSelectColumns + kBlockThreads - 1) / kBlockThreads;
  static constexpr int kLoadsInFlight = 8;

  DJ_DEVICE void FindScales() {
    for (int r = Warp(); r < rows_; r += kWarps) {
      const int point = p_.points[first_row_ + r], rank = point == kSelectEverything ? 0 : p_.ranks[point];
      const float scale = QuantizedScale(Row(p_.a, first_row_ + r), rank);
      if (Lane() == 0) {
        scales_[r] = scale;
        ranks_[r] = rank;
      }
    }
    __syncthreads();
  }

  // Coordinates first ... first + n as integers. Beyond its rank a row has zeros.
  DJ_DEVICE void Stage(int first, int n) {
    __syncthreads();
    for (int i = Thread(); i < n * kRows; i += kBlockThreads) {
      const int k = i / kRows, r = i % kRows;
      const bool there = r < rows_ && first + k < ranks_[r];
      q_[i] = there ? static_cast<int16_t>(Quantize(Row(p_.a, first_row_ + r)[first + k], QuantizedInverse(scales_[r])))
                    : int16_t{0};
    }
    __syncthreads();
  }

  DJ_DEVICE void Accumulate(int first, int n) {
    int32_t sums[kRows][4] = {};
    const int column = column_ + 4 * Lane();
    if (column < p_.words * 32) {
      const int8_t* b = Row(p_.b, first) + column;
      int k = Warp();
      for (; k + (kLoadsInFlight - 1) * kWarps < n; k += kLoadsInFlight * kWarps) {
        uint32_t v[kLoadsInFlight];
#pragma unroll
        for (int i = 0; i < kLoadsInFlight; ++i) v[i] = Load(b, k + i * kWarps);
#pragma unroll
        for (int i = 0; i < kLoadsInFlight; ++i) Add(v[i], k + i * kWarps, sums);
      }
      for (; k < n; k += kWarps) Add(Load(b, k), k, sums);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums_[(Warp() * kRows + r) * kSelectColumns + 4 * Lane() + c] = sums[r][c];
    }
    __syncthreads();
  }

  DJ_DEVICE uint32_t Load(const int8_t* b, int k) const {
    return __ldg(reinterpret_cast<const uint32_t*>(b + k * p_.b.stride));
  }

  DJ_DEVICE void Add(uint32_t v, int k, int32_t (&sums)[kRows][4]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t q = q_[k * kRows + r];
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[r][c] += q * static_cast<int8_t>(v >> (8 * c));
    }
  }

  DJ_DEVICE int32_t SumOf(int item) const {
    if (item >= kRows * kSelectColumns) return 0;
    int32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums_[w * kRows * kSelectColumns + item];
    return sum;
  }

  // A warp's items are the 32 columns of a word.
  DJ_DEVICE void Compare(int item, float total) const {
    const int r = item / kSelectColumns, column = column_ + item % kSelectColumns;
    const bool there = r < rows_ && column < p_.words * 32;
    bool chosen = false;
    if (there) {
      const int point = p_.points[first_row_ + r];
      chosen = point == kSelectEverything ? column < p_.outputs
                                          : total * scales_[r] > HalfToFloat(Row(p_.thresholds, point)[column]);
    }
    const uint32_t word = __ballot_sync(kAllLanes, chosen);
    if (there && Lane() == 0) Row(p_.masks, first_row_ + r)[column / 32] = static_cast<int32_t>(word);
  }

  const SelectParams& p_;
  const int groups_;  // of rows
  const int first_row_, rows_;
  const int column_;
  int16_t* const q_;
  int32_t* const sums_;
  float* const scales_;   // [kRows]
  int32_t* const ranks_;  // [kRows]
};

// How many outputs each row selected, and the ascending list of all.
DJ_DEVICE void MakeList(const SelectParams& p) {
  DJ_SHARED(int32_t, warp_counts, kWarps);
  const MatrixOf<const int32_t> masks = {p.masks.data, p.masks.stride};
  for (int r = Warp(); r < p.rows; r += kWarps) {
    int count = 0;
    for (int word = Lane(); word < p.words; word += 32) count += __popc(static_cast<uint32_t>(Row(masks, r)[word]));
    for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(kAllLanes, count, step);
    if (Lane() == 0) p.counts[r] = count;
  }
  // Each thread has some words that follow each other.
  const int share = DivideUp(p.words, kBlockThreads), first = Thread() * share, last = Min(first + share, p.words);
  int own = 0;
  for (int word = first; word < last; ++word) own += __popc(UnionWord(masks, p.rows, word));
  int before = own;  // of the threads of this warp up to this one
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, step);
    if (Lane() >= step) before += other;
  }
  if (Lane() == 31) warp_counts[Warp()] = before;
  __syncthreads();
  int place = before - own;
  for (int w = 0; w < Warp(); ++w) place += warp_counts[w];
  for (int word = first; word < last; ++word) {
    for (uint32_t any = UnionWord(masks, p.rows, word); any != 0; any &= any - 1) {
      p.list[place++] = word * 32 + __ffs(any) - 1;
    }
  }
  if (Thread() == kBlockThreads - 1) p.list_count[0] = place;
}

template <int kRows>
DJ_DEVICE void NormSelect(const NormSelectParams& p) {
  DJ_DYNAMIC_SHARED(float, shared);
  DJ_SHARED(int16_t, q, kCoordinates * kRows);
  DJ_SHARED(float, scales, kRows);
  DJ_SHARED(int32_t, ranks, kRows);
  const int block = static_cast<int>(blockIdx.x) - p.norm.rows;
  NormBlock<true> norm(p.norm, shared);
  if (block < 0) norm.Begin();
  GridWait();
  GridLaunchDependents();
  if (block < 0) {
    norm.Run(static_cast<int>(blockIdx.x));
    return;
  }
  SelectBlock<kRows>(p.select, block, q, reinterpret_cast<int32_t*>(shared), scales, ranks).Run();
  if (IsLastBlock(p.select.ticket, gridDim.x - static_cast<uint32_t>(p.norm.rows))) MakeList(p.select);
}

DJ_KERNEL(NormSelect1, NormSelectParams, kBlockThreads) { NormSelect<1>(p); }
DJ_KERNEL(NormSelect8, NormSelectParams, kBlockThreads) { NormSelect<8>(p); }

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_SELECT_CUH_
