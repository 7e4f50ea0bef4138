// Products, blocked for the caches. A dot product tile is kTileRows rows of x by 4 rows of weights: weights come in
// blocks that stay in L2 while every row of x passes, so memory is read once. A sum of rows streams a few inputs at a
// time while the rows of x are few; when they are many, a panel of weights is first widened and packed, or the
// power-of-two stride of its rows would throw its own lines out of the cache.
#include <algorithm>

#include "kernels/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear.cc"
#include "hwy/foreach_target.h"

// What follows is included once for each target, so it stays below foreach_target.h.
#include "kernels/cpu/tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dejavu::cpu::HWY_NAMESPACE {

constexpr int kTileOutputs = 4;
constexpr int64_t kWeightBlockBytes = 128 << 10;
constexpr int64_t kStreamInputs = 8;
constexpr int64_t kStreamRows = 8;
constexpr int64_t kPanelInputs = 128;
static_assert(kPanelInputs * kTileVectors * kLanes * static_cast<int64_t>(sizeof(float)) <= kSumScratchBytes);

// Calls function.template operator()<kRows>(first) for tiles of rows: as many of kTileRows as fit, then one of the
// rest.
template <int kRows = kTileRows, typename Function>
HWY_INLINE void ForRowTiles(int64_t rows, const Function& function, int64_t first = 0) {
  for (; rows - first >= kRows; first += kRows) function.template Tile<kRows>(first);
  if constexpr (kRows > 1) ForRowTiles<kRows - 1>(rows, function, first);
}

// Outputs first ... last of the list for tiles of rows of x.
template <typename W>
struct DotBlock {
  const DotJob& job;
  int64_t first;
  int64_t last;

  int64_t Output(int64_t i) const { return job.outputs != nullptr ? job.outputs[i] : i; }
  const W* Weights(int64_t i) const { return job.w->weight.template row<W>(Output(i)); }

  template <int kRows>
  void Tile(int64_t row) const {
    // Four chains of multiply-adds are too few to hide their latency.
    constexpr int kOutputs = kRows == 1 ? 2 * kTileOutputs : kTileOutputs;
    int64_t i = first;
    for (; i + kOutputs <= last; i += kOutputs) Outputs<kRows, kOutputs>(row, i);
    for (; i < last; ++i) Outputs<kRows, 1>(row, i);
  }

  template <int kRows, int kOutputs>
  HWY_INLINE void Outputs(int64_t row, int64_t i) const {
    const W* w[kOutputs];
    const W* next[kOutputs];
    for (int o = 0; o < kOutputs; ++o) {
      w[o] = Weights(i + o);
      next[o] = Weights(std::min(i + kOutputs + o, last - 1));
    }
    const float* x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = job.x.row<float>(row + r);
    float y[kRows][kOutputs];
    DotTile<W, kRows, kOutputs>(w, row == 0 ? next : nullptr, x, job.x.cols, y);
    const float* bias = job.w->bias.empty() ? nullptr : job.w->bias.row<float>(0);
    const float* scale = job.w->scale.empty() ? nullptr : job.w->scale.row<float>(0);
    for (int o = 0; o < kOutputs; ++o) {
      const int64_t output = Output(i + o);
      for (int r = 0; r < kRows; ++r) {
        const float product = scale != nullptr ? y[r][o] * scale[output] : y[r][o];
        const float sum = product + (bias != nullptr ? bias[output] : 0.0f);
        job.y.row<float>(row + r)[output] = job.relu && sum < 0.0f ? 0.0f : sum;
      }
    }
  }
};

template <typename W>
void DotProductsOf(const DotJob& job, int64_t first, int64_t last) {
  const int64_t row_bytes = std::max<int64_t>(1, job.x.cols * sizeof(W));
  const int64_t block = std::max<int64_t>(1, kWeightBlockBytes / row_bytes / kTileOutputs) * kTileOutputs;
  for (int64_t i = first; i < last; i += block) {
    ForRowTiles(job.x.rows, DotBlock<W>{job, i, std::min(i + block, last)});
  }
}

void DotProducts(const DotJob& job, int64_t first, int64_t last) {
  switch (job.w->weight.dtype) {
    case DType::kFloat32:
      return DotProductsOf<float>(job, first, last);
    case DType::kFloat16:
      return DotProductsOf<hwy::float16_t>(job, first, last);
    case DType::kBFloat16:
      return DotProductsOf<hwy::bfloat16_t>(job, first, last);
    case DType::kInt8:
      return DotProductsOf<int8_t>(job, first, last);
    default:
      CHECK(false) << "weights of type " << Name(job.w->weight.dtype);
  }
}

// `count` inputs from `first` on.
template <typename W>
Inputs<W> InputsOf(const SumJob& job, int64_t first, int64_t count) {
  const Tensor& weight = job.w->weight;
  if (job.inputs != nullptr) {
    const int32_t* list = job.inputs + first;
    return {job.x.row<float>(0), job.x.stride, list, weight.row<W>(0), weight.stride, list, count};
  }
  return {job.x.row<float>(0) + first, job.x.stride, nullptr, weight.row<W>(first), weight.stride, nullptr, count};
}

// A few inputs, all columns of the part; `next` follows in memory order and is fetched ahead.
template <typename W>
struct Stream {
  const SumJob& job;
  Inputs<W> in;
  Inputs<W> next;
  int64_t first;
  int64_t last;

  template <int kRows>
  void Tile(int64_t row) const {
    constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(W));
    constexpr int64_t kWidth = kTileVectors * kLanes;
    constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(W));
    Inputs<W> mine = in;
    mine.x += row * in.x_stride;
    float* y = job.y.row<float>(row);
    int64_t column = first;
    for (; column + kWidth <= last; column += kWidth) {
      if (row == 0 && (column - first) % kLine == 0) {
        const bool same = column + kAhead < last;
        const Inputs<W>& source = same ? in : next;
        const int64_t ahead = same ? column + kAhead : first + (column + kAhead - last);
        for (int64_t i = 0; i < source.count; ++i) {
          for (int64_t c = 0; c < kWidth; c += kLine) Prefetch(source.row(i) + ahead + c);
        }
      }
      SumTile<W, kRows, kTileVectors>(mine, column, y, job.y.stride);
    }
    SumColumns<W, kRows>(mine, column, last, y, job.y.stride);
  }
};

// A packed panel of inputs by one tile of columns.
struct Panel {
  const SumJob& job;
  Inputs<float> in;
  int64_t column;

  template <int kRows>
  void Tile(int64_t row) const {
    Inputs<float> mine = in;
    mine.x += row * in.x_stride;
    SumTile<float, kRows, kTileVectors>(mine, 0, job.y.row<float>(row) + column, job.y.stride);
  }
};

template <typename W>
void StreamRows(const SumJob& job, int64_t first, int64_t last) {
  for (int64_t i = 0; i < job.count; i += kStreamInputs) {
    const int64_t end = std::min(i + kStreamInputs, job.count);
    ForRowTiles(job.x.rows, Stream<W>{job, InputsOf<W>(job, i, end - i),
                                      InputsOf<W>(job, end, std::min(kStreamInputs, job.count - end)), first, last});
  }
}

template <typename W>
void PackedRows(const SumJob& job, int64_t first, int64_t last, float* scratch) {
  constexpr int64_t kWidth = kTileVectors * kLanes;
  for (int64_t i = 0; i < job.count; i += kPanelInputs) {
    const Inputs<W> in = InputsOf<W>(job, i, std::min(kPanelInputs, job.count - i));
    for (int64_t column = first; column < last; column += kWidth) {
      for (int64_t k = 0; k < in.count; ++k) {
        const W* w = in.row(k) + column;
        Prefetch(w + kWidth);
        for (int v = 0; v < kTileVectors; ++v) {
          hn::Store(Widen(w + v * kLanes), F32(), scratch + k * kWidth + v * kLanes);
        }
      }
      const Inputs<float> packed = {in.x, in.x_stride, in.x_list, scratch, kWidth, nullptr, in.count};
      ForRowTiles(job.x.rows, Panel{job, packed, column});
    }
  }
}

template <typename W>
void SumRowsOf(const SumJob& job, int64_t first, int64_t last, float* scratch) {
  for (int64_t r = 0; r < job.y.rows; ++r) std::fill(job.y.row<float>(r) + first, job.y.row<float>(r) + last, 0.0f);
  int64_t packed = first;
  if (job.x.rows > kStreamRows) {
    packed = last - (last - first) % (kTileVectors * kLanes);
    PackedRows<W>(job, first, packed, scratch);
  }
  if (packed < last) StreamRows<W>(job, packed, last);
  // Adding zero turns a sum of -0 into 0, as if an input with activation zero had been added; a bias of -0 would not.
  const float* bias = job.w->bias.empty() ? nullptr : job.w->bias.row<float>(0);
  for (int64_t r = 0; r < job.y.rows; ++r) {
    float* y = job.y.row<float>(r);
    for (int64_t c = first; c < last; ++c) y[c] = y[c] + 0.0f + (bias != nullptr ? bias[c] : 0.0f);
  }
}

void SumRows(const SumJob& job, int64_t first, int64_t last, float* scratch) {
  switch (job.w->weight.dtype) {
    case DType::kFloat32:
      return SumRowsOf<float>(job, first, last, scratch);
    case DType::kFloat16:
      return SumRowsOf<hwy::float16_t>(job, first, last, scratch);
    case DType::kBFloat16:
      return SumRowsOf<hwy::bfloat16_t>(job, first, last, scratch);
    case DType::kInt8:
      return SumRowsOf<int8_t>(job, first, last, scratch);
    default:
      CHECK(false) << "weights of type " << Name(job.w->weight.dtype);
  }
}

}  // namespace dejavu::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dejavu::cpu {

HWY_EXPORT(DotProducts);
HWY_EXPORT(SumRows);

void DotProducts(const DotJob& job, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(DotProducts)(job, first, last);
}

void SumRows(const SumJob& job, int64_t first, int64_t last, float* scratch) {
  HWY_DYNAMIC_DISPATCH(SumRows)(job, first, last, scratch);
}

}  // namespace dejavu::cpu
#endif
