// Products where an input is a row of the weight: sums of rows, in segments of inputs that are fixed by their number
// (SegmentInputs), so that threads can share the inputs, each reading whole rows, and no bit depends on who read what.
// A few inputs at a time pass all columns; accumulators of few rows of x stay in registers for a tile of columns.
#include <algorithm>

#include "kernels/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sum.cc"
#include "hwy/foreach_target.h"

// What follows is included once for each target, so it stays below foreach_target.h.
#include "kernels/cpu/tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dejavu::cpu::HWY_NAMESPACE {

constexpr int64_t kFewInputs = 8;  // read side by side for the rows of one tile, which must not wait for memory often
constexpr int64_t kChunkInputs = 64;    // and for more rows, which spares visits to their accumulators: even
constexpr int64_t kBlockColumns = 256;  // of a block where the rows are several tiles
constexpr int64_t kBlockRows = 64;      // rows of x whose accumulators for a block fit L2
constexpr int64_t kBlockFloats = kBlockRows * kBlockColumns;
constexpr int64_t kOwnInputs = kChunkInputs + 1;  // of a row, and the partner of an odd one
static_assert((2 * kBlockFloats + kChunkInputs * kBlockRows) * int64_t{sizeof(float)} +
                  kBlockRows * kOwnInputs * int64_t{sizeof(void*)} <=
              kScratchBytes);

// Vectors of a tile: accumulators enough to hide the latency of a multiply-add and no more than the registers hold.
constexpr int kTileRows = 6;
template <int kRows>
constexpr int kVectorsOf = kRows == 1                             ? 8
                           : kRows <= 3 || HWY_TARGET <= HWY_AVX3 ? 4
                                                                  : 2;

// Floats: one multiply-add after the other for each input. A unit is a step (kStepVectors): in the accumulators its
// even columns lie before the odd ones.
template <typename W>
struct FloatTerms {
  using Weight = W;
  static constexpr int64_t kLeastInputs = 1;  // that are read side by side
  static constexpr int kVectors = kStepVectors<W>;
  static constexpr int64_t kUnit = kStepInputs<W>;  // columns are a multiple of it, but for the last

  // Vector number v, of column `from` on; of a single unit the first n columns.
  template <bool kSingle>
  static HWY_INLINE V Weights(const W* from, int v, int64_t n) {
    if (kSingle && n < kUnit) return v % kVectors == 0 ? WidenOfPart<0>(from, n) : WidenOfPart<kVectors - 1>(from, n);
    const W* unit = from + v / kVectors * kUnit;
    return v % kVectors == 0 ? WidenOfStep<0>(unit) : WidenOfStep<kVectors - 1>(unit);
  }

  // a[r][c] += sum over the inputs of x[r][i] * w[i][c]; `n` columns, at most kUnits * kUnit.
  template <int kRows, int kUnits>
  static HWY_INLINE void Tile(const W* const* w, int64_t column, int64_t n, const float* x, int64_t inputs, float* sums,
                              int64_t stride) {
    constexpr int kAll = kUnits * kVectors;
    V sum[kRows][kAll];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kAll; ++v) sum[r][v] = hn::LoadU(F32(), sums + r * stride + v * kLanes);
    }
    for (int64_t i = 0; i < inputs; ++i) {
      const W* from = w[i] + column;
      OuterProduct<kRows, kAll>([&](int r) HWY_ATTR { return hn::Set(F32(), x[r * kChunkInputs + i]); },
                                [&](int v) HWY_ATTR { return Weights<kUnits == 1>(from, v, n); },
                                [&](int r, int v, V xi, V wv) HWY_ATTR { sum[r][v] = hn::MulAdd(xi, wv, sum[r][v]); });
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kAll; ++v) hn::StoreU(sum[r][v], F32(), sums + r * stride + v * kLanes);
    }
  }

  static V Total(const float* sums) { return hn::LoadU(F32(), sums); }
  static void Store(const V* total, float* y, int64_t n) {
    if constexpr (kVectors == 1) return StoreFirst(*total, y, n);
#if HWY_TARGET != HWY_SCALAR
    if (n == kUnit) return hn::StoreInterleaved2(total[0], total[1], F32(), y);
    alignas(64) float unit[kUnit];
    hn::StoreInterleaved2(total[0], total[1], F32(), unit);
    std::copy_n(unit, n, y);
#endif
  }
};

struct PairOfPairs {
  VI16 low, high;
};

// int8 weights of two inputs, interleaved, by pairs of int16 activations. In the accumulators the columns of a unit lie
// as the interleaving leaves them; Store puts them in order.
template <bool kVnni>
struct IntegerTerms {
  using Weight = int8_t;
  static constexpr int64_t kLeastInputs = 2;
  static constexpr int64_t kUnit = kPairLanes;

  template <int kRows, int kUnits>
  static HWY_INLINE void Tile(const int8_t* const* w, int64_t column, int64_t n, const float* x, int64_t inputs,
                              float* sums, int64_t stride) {
    VI32 sum[kRows][kUnits][2];
    auto* const kept = reinterpret_cast<int32_t*>(sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kUnits; ++v) {
        sum[r][v][0] = hn::LoadU(I32(), kept + r * stride + v * kUnit);
        // A unit of the scalar target has no second vector: what lies there is another thread's.
        sum[r][v][1] = kUnit > kLanes ? hn::LoadU(I32(), kept + r * stride + v * kUnit + kLanes) : hn::Zero(I32());
      }
    }
    for (int64_t i = 0; i < inputs; i += 2) {
      const int8_t* a = w[i] + column;
      const int8_t* b = w[i + 1] + column;
      OuterProduct<kRows, kUnits>(
          [&](int r) HWY_ATTR { return SetPair(reinterpret_cast<const int32_t*>(x)[r * kChunkInputs + i / 2]); },
          [&](int v) HWY_ATTR {
            const bool whole = kUnits > 1 || n == kUnit;
            const VI16 wa = whole ? WidenPair(a + v * kUnit) : WidenPairPart(a, n);
            const VI16 wb = whole ? WidenPair(b + v * kUnit) : WidenPairPart(b, n);
            return PairOfPairs{InterleavePairLower(wa, wb), InterleavePairUpper(wa, wb)};
          },
          [&](int r, int v, VI16 xi, const PairOfPairs& wv) HWY_ATTR {
            sum[r][v][0] = AddPairProducts<kVnni>(xi, wv.low, sum[r][v][0]);
            sum[r][v][1] = AddPairProducts<kVnni>(xi, wv.high, sum[r][v][1]);
          });
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kUnits; ++v) {
        hn::StoreU(sum[r][v][0], I32(), kept + r * stride + v * kUnit);
        if (kUnit > kLanes) hn::StoreU(sum[r][v][1], I32(), kept + r * stride + v * kUnit + kLanes);
      }
    }
  }

  static V Total(const float* sums) {
    return hn::ConvertTo(F32(), hn::LoadU(I32(), reinterpret_cast<const int32_t*>(sums)));
  }
  static void Store(const V* total, float* y, int64_t n) {
    alignas(64) float unit[kUnit];
    hn::StoreU(total[0], F32(), unit);
    if constexpr (kUnit > kLanes) hn::StoreU(total[1], F32(), unit + kLanes);
    for (int64_t c = 0; c < n; ++c) y[c] = unit[PairPlace(c)];
  }
};

// So few rows of x that memory binds, which gives one row of weights after the other most.
constexpr int64_t kStreamRows = 1;

// A chunk of inputs by a range of columns.
template <typename Terms, bool kFetches = true>
struct SumBlock {
  const typename Terms::Weight* const* w;  // [inputs] their rows; then, for Fetch, the ones to be read after them
  const float* x;                          // [rows][kChunkInputs]
  int64_t inputs;
  int64_t first;  // columns
  int64_t last;
  float* sums;  // [rows][stride], of column `first`
  int64_t stride;
  int64_t all_rows;

  template <int kRows>
  void Tile(int64_t r) const {
    constexpr int64_t kUnit = Terms::kUnit;
    constexpr int kUnits = std::max<int>(1, kVectorsOf<kRows> * kLanes / kUnit);
    const Turn mine = TurnOf(r, all_rows, kTileRows);
    int64_t c = first;
    for (; c + kUnits * kUnit <= last; c += kUnits * kUnit) {
      if constexpr (kFetches) Fetch<kRows <= kStreamRows>(mine, c, kUnits * kUnit);
      Terms::template Tile<kRows, kUnits>(w, c, kUnit, x + r * kChunkInputs, inputs, sums + r * stride + c - first,
                                          stride);
    }
    for (; c < last; c += kUnit) {
      Terms::template Tile<kRows, 1>(w, c, std::min(kUnit, last - c), x + r * kChunkInputs, inputs,
                                     sums + r * stride + c - first, stride);
    }
  }

  // What will be read when `n` columns from `c` on have been.
  template <bool kStream>
  HWY_INLINE void Fetch(Turn mine, int64_t c, int64_t n) const {
    using W = typename Terms::Weight;
    constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(W));
    const int64_t ahead = std::min<int64_t>((kStream ? kStreamBytes : kPrefetchBytes) / sizeof(W), last - first);
    const bool same = c + ahead < last;
    const int64_t at = same ? c + ahead : c + ahead - (last - first);
    const W* const* rows = same ? w : w + inputs;
    if (n < kLine && c % kLine != 0) return;
    for (int64_t i = mine.turn; i < inputs; i += mine.turns) {
      for (int64_t k = 0; k < n; k += kLine) {
        Prefetch<kStream>(rows[i] + at + k);
      }
    }
  }
};

template <typename Terms>
class SumRun {
  using W = typename Terms::Weight;
  static constexpr bool kFloats = std::is_same_v<Terms, FloatTerms<W>>;

 public:
  SumRun(const SumJob& job, float* scratch)
      : job_(job),
        x_(scratch),
        sums_(x_ + kChunkInputs * kBlockRows),
        totals_(sums_ + kBlockFloats),
        own_(reinterpret_cast<const W**>(totals_ + kBlockFloats)) {}

  // sums = the terms of the inputs first ... last of the list, columns c0 ... c1 of rows r0 ... r0 + rows.
  void Segment(int64_t first, int64_t last, int64_t c0, int64_t c1, int64_t r0, int64_t rows, float* sums,
               int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(sums + r * stride, Padded(c1 - c0), 0.0f);
    const bool scattered = Scattered(job_.inputs, first, last);
    const int64_t chunk = rows <= kStreamRows ? (scattered ? 2 : Terms::kLeastInputs)
                          : rows <= kTileRows ? kFewInputs
                                              : kChunkInputs;
    const int64_t block = rows <= kTileRows ? c1 - c0 : kBlockColumns;
    for (int64_t i = first; i < last; i += chunk) {
      const int64_t n = std::min(chunk, last - i), even = n + n % 2;
      const W* w[2 * kChunkInputs];
      for (int64_t k = 0; k < n; ++k) w[k] = Row(i + k);
      w[n] = w[n - 1];  // the partner of an odd one, times zero
      const int64_t inputs = kFloats ? n : even;
      for (int64_t k = 0; k < inputs; ++k) w[inputs + k] = Row(std::min(i + n + k, job_.count - 1));
      GatherX(i, n, r0, rows);
      const bool apart = rows > kTileRows && BetterApart(NonZero(n, rows), n * rows);
      if (apart) TakeOwn(w, n, rows);
      for (int64_t c = c0; c < c1; c += block) {
        const int64_t end = std::min(c + block, c1);
        const SumBlock<Terms> all{w, x_, inputs, c, end, sums + c - c0, stride, rows};
        if (apart) {
          RowsApart(all);
        } else {
          ForRowTiles<kTileRows>(rows, all);
        }
      }
    }
  }

  // Columns c0 ... c1 of all rows: segment after segment.
  void Columns(int64_t c0, int64_t c1) {
    for (int64_t r = 0; r < job_.x.rows; r += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, job_.x.rows - r);
      const int64_t block = rows <= kSegmentRows ? kBlockFloats / kSegmentRows : kBlockColumns;
      for (int64_t c = c0; c < c1; c += block) {
        const int64_t end = std::min(c + block, c1), padded = Padded(end - c);
        std::fill_n(totals_, rows * block, 0.0f);
        for (int64_t s = 0; s < job_.segments; ++s) {
          if (job_.bounds[s] == job_.bounds[s + 1]) continue;
          Segment(job_.bounds[s], job_.bounds[s + 1], c, end, r, rows, sums_, block);
          for (int64_t a = 0; a < rows; ++a) AddTo(totals_ + a * block, sums_ + a * block, padded);
        }
        for (int64_t a = 0; a < rows; ++a) Finish(r + a, c, end, totals_ + a * block);
      }
    }
  }

  // Columns c0 ... c1 of all rows out of the segments' sums.
  void Join(int64_t c0, int64_t c1) {
    for (int64_t r = 0; r < job_.x.rows; ++r) {
      for (int64_t c = c0; c < c1; c += kBlockColumns) {
        const int64_t end = std::min(c + kBlockColumns, c1), padded = Padded(end - c);
        std::fill_n(totals_, padded, 0.0f);
        for (int64_t s = 0; s < job_.segments; ++s) {
          if (job_.bounds[s] == job_.bounds[s + 1]) continue;
          AddTo(totals_, job_.sums + (s * job_.x.rows + r) * job_.sums_stride + c, padded);
        }
        Finish(r, c, end, totals_);
      }
    }
  }

 private:
  static int64_t Padded(int64_t columns) { return RoundUp(columns, Terms::kUnit); }
  const W* Row(int64_t i) const { return job_.w->weight.template row<W>(job_.inputs != nullptr ? job_.inputs[i] : i); }

  // Activations of the chunk as they are multiplied: one after the other, of integers the pairs of them.
  using X = std::conditional_t<kFloats, float, int16_t>;
  X* ChunkX(int64_t r) const { return reinterpret_cast<X*>(x_ + r * kChunkInputs); }

  // Activations of the chunk that are not zero.
  int64_t NonZero(int64_t n, int64_t rows) const {
    int64_t terms = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const X* x = ChunkX(r);
      for (int64_t k = 0; k < n; ++k) terms += x[k] != 0;
    }
    return terms;
  }

  // Of each row only the inputs that are not zero, with their weights.
  void TakeOwn(const W* const* w, int64_t n, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      X* x = ChunkX(r);
      const W** own = own_ + r * kOwnInputs;
      int64_t count = 0;
      for (int64_t k = 0; k < n; ++k) {
        const X mine = x[k];
        own[count] = w[k];
        x[count] = mine;
        count += mine != 0;
      }
      if (!kFloats && count % 2 != 0) {
        own[count] = own[count - 1];
        x[count++] = 0;
      }
      own_inputs_[r] = count;
    }
  }

  void RowsApart(const SumBlock<Terms>& all) const {
    for (int64_t r = 0; r < all.all_rows; ++r) {
      all.template Fetch<false>(Turn{r, all.all_rows}, all.first, all.last - all.first);
      SumBlock<Terms, /*kFetches=*/false>{
          own_ + r * kOwnInputs, all.x, own_inputs_[r], all.first, all.last, all.sums, all.stride, all.all_rows}
          .template Tile<1>(r);
    }
  }

  // The chunk's activations side by side; integers as pairs.
  void GatherX(int64_t first, int64_t n, int64_t r0, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      float* to = x_ + r * kChunkInputs;
      if constexpr (kFloats) {
        const float* from = job_.x.row<float>(r0 + r);
        for (int64_t k = 0; k < n; ++k) to[k] = from[job_.inputs != nullptr ? job_.inputs[first + k] : first + k];
      } else {
        const int16_t* from = job_.quantized.q + (r0 + r) * job_.quantized.stride + first;
        auto* pairs = reinterpret_cast<int16_t*>(to);
        for (int64_t k = 0; k < n; ++k) pairs[k] = from[k];
        if (n % 2 != 0) pairs[n] = 0;
      }
    }
  }

  static void AddTo(float* total, const float* sums, int64_t n) {
    for (int64_t k = 0; k < n; k += kLanes) {
      hn::StoreU(hn::Add(hn::LoadU(F32(), total + k), Terms::Total(sums + k)), F32(), total + k);
    }
  }

  void Finish(int64_t r, int64_t c0, int64_t c1, const float* total) const {
    float* y = job_.y.row<float>(r);
    const float* bias = job_.w->bias.empty() ? nullptr : job_.w->bias.row<float>(0);
    const V scale = hn::Set(F32(), kFloats ? 1.0f : job_.quantized.scale[r]);
    for (int64_t c = c0; c < c1; c += Terms::kUnit) {
      const int64_t n = std::min(Terms::kUnit, c1 - c);
      V unit[2];
      for (int64_t v = 0; v * kLanes < Terms::kUnit; ++v) {
        unit[v] = hn::Mul(hn::LoadU(F32(), total + c - c0 + v * kLanes), scale);
      }
      Terms::Store(unit, y + c, n);
    }
    if (bias == nullptr) return;
    for (int64_t c = c0; c < c1; ++c) y[c] += bias[c];
  }

  const SumJob& job_;
  float* const x_;       // [kBlockRows][kChunkInputs]
  float* const sums_;    // [kBlockRows][kBlockColumns]
  float* const totals_;  // [kBlockRows][kBlockColumns]
  const W** const own_;  // [kBlockRows][kOwnInputs]
  int64_t own_inputs_[kBlockRows];
};

// function.operator()<Terms>().
template <typename Function>
void WithTerms(const SumJob& job, const Function& function) {
  switch (job.w->weight.dtype) {
    case DType::kFloat32:
      return function.template operator()<FloatTerms<float>>();
    case DType::kFloat16:
      return function.template operator()<FloatTerms<hwy::float16_t>>();
    case DType::kBFloat16:
      return function.template operator()<FloatTerms<hwy::bfloat16_t>>();
    case DType::kInt8:
      return WithVnni([&]<bool kVnni>() HWY_ATTR { function.template operator()<IntegerTerms<kVnni>>(); });
    default:
      CHECK(false) << "weights of type " << Name(job.w->weight.dtype);
  }
}

void SumSegment(const SumJob& job, int64_t segment, int64_t first, int64_t last, float* scratch) {
  WithTerms(job, [&]<typename Terms>() HWY_ATTR {
    SumRun<Terms>(job, scratch)
        .Segment(job.bounds[segment], job.bounds[segment + 1], first, last, 0, job.x.rows,
                 job.sums + segment * job.x.rows * job.sums_stride + first, job.sums_stride);
  });
}

void JoinSegments(const SumJob& job, int64_t first, int64_t last, float* scratch) {
  WithTerms(job, [&]<typename Terms>() HWY_ATTR { SumRun<Terms>(job, scratch).Join(first, last); });
}

void SumColumns(const SumJob& job, int64_t first, int64_t last, float* scratch) {
  WithTerms(job, [&]<typename Terms>() HWY_ATTR { SumRun<Terms>(job, scratch).Columns(first, last); });
}

}  // namespace dejavu::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dejavu::cpu {

HWY_EXPORT(SumSegment);
HWY_EXPORT(JoinSegments);
HWY_EXPORT(SumColumns);

int64_t SegmentInputs(int64_t inputs) {
  constexpr int64_t kSegments = 16, kLeast = 64;
  return std::clamp((inputs / kSegments + kLeast - 1) / kLeast * kLeast, kLeast, kQuantizedBlock);
}

void SumSegment(const SumJob& job, int64_t segment, int64_t first, int64_t last, float* scratch) {
  HWY_DYNAMIC_DISPATCH(SumSegment)(job, segment, first, last, scratch);
}

void JoinSegments(const SumJob& job, int64_t first, int64_t last, float* scratch) {
  HWY_DYNAMIC_DISPATCH(JoinSegments)(job, first, last, scratch);
}

void SumColumns(const SumJob& job, int64_t first, int64_t last, float* scratch) {
  HWY_DYNAMIC_DISPATCH(SumColumns)(job, first, last, scratch);
}

}  // namespace dejavu::cpu
#endif
