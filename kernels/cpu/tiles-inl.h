// Loads that widen to float32 and the two register tiles that all products are made of, for the target being compiled.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hwy/highway.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/target.h"

#if defined(KERNELS_CPU_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_CPU_TILES_INL_H_
#undef KERNELS_CPU_TILES_INL_H_
#else
#define KERNELS_CPU_TILES_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace dejavu::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using V = hn::Vec<F32>;
constexpr int64_t kLanes = hn::MaxLanes(F32());
constexpr int64_t kPrefetchBytes = 2048;
constexpr int64_t kStreamBytes =
    4096;  // ahead of a single row of x, for which weights are read one row after the other
constexpr int64_t kLineBytes = 64;

constexpr int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Ties an accumulator to its register at this point: where a tile takes nearly all of them, g++ 12 moves instructions
// so far apart that it spills.
template <typename Vector>
HWY_INLINE void Pin(Vector& v) {
#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR
  asm("" : "+v"(v.raw));
#else
  (void)v;
#endif
}

// The sum of the lanes: the upper half is added to the lower until one is left.
#if HWY_TARGET == HWY_SCALAR
HWY_INLINE float SumLanes(F32 /*d*/, V v) { return hn::GetLane(v); }
#else
template <typename D>
HWY_INLINE float SumLanes(D /*d*/, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(D()) == 1) {
    return hn::GetLane(v);
  } else {
    const hn::Half<D> half;
    return SumLanes(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}
#endif

// Into L2 only: rows lie a power of two apart and share the sets of L1, where what is fetched early would be lost
// again. Of a single stream, kNear, little is lost there.
template <bool kNear = false>
HWY_INLINE void Prefetch(const void* p) {
  __builtin_prefetch(p, /*write=*/0, /*locality=*/kNear ? 3 : 2);
}

// Tiles of several rows pass the same weights: each fetches every `turns`-th line of what comes after them, from its
// turn on, so that memory is never asked for all at once.
struct Turn {
  int64_t turn;
  int64_t turns;
};

// Of the tile at row r of `rows`, of tiles of at most `tile_rows`.
HWY_INLINE Turn TurnOf(int64_t r, int64_t rows, int64_t tile_rows) {
  const int64_t turns = (rows + tile_rows - 1) / tile_rows;
  return {r * turns / rows, turns};
}

// Whether a tile of so many outputs streams: memory binds it, not arithmetic.
template <int kOutputs>
constexpr bool kStreams = kOutputs <= 2;

// How far ahead a tile fetches.
template <int kOutputs>
constexpr int64_t kAheadBytes = kStreams<kOutputs> ? kStreamBytes : kPrefetchBytes;

// Whether the entries first ... last of the list name rows with gaps of more than a quarter between them. nullptr: no.
HWY_INLINE bool Scattered(const int32_t* list, int64_t first, int64_t last) {
  return list != nullptr && last - first > 1 && (list[last - 1] - list[first]) * 4 > (last - first) * 5;
}

HWY_INLINE V Widen(const float* p) { return hn::LoadU(F32(), p); }

HWY_INLINE V Widen(const int8_t* p) {
  const hn::Rebind<int8_t, F32> di8;
  const hn::Rebind<int32_t, F32> di32;
  return hn::ConvertTo(F32(), hn::PromoteTo(di32, hn::LoadU(di8, p)));
}

HWY_INLINE V Widen(const hwy::bfloat16_t* p) {
  const hn::Rebind<uint16_t, F32> du16;
  const hn::Rebind<uint32_t, F32> du32;
  const auto bits = hn::LoadU(du16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(F32(), hn::ShiftLeft<16>(hn::PromoteTo(du32, bits)));
}

HWY_INLINE V Widen(const hwy::float16_t* p) {
#if HWY_TARGET <= HWY_AVX2
  return hn::PromoteTo(F32(), hn::LoadU(hn::Rebind<hwy::float16_t, F32>(), p));
#else
  // Without F16C. The multiplication moves the exponent's bias and makes subnormals normal; Highway's own emulation
  // does not know infinities.
  const hn::Rebind<uint16_t, F32> du16;
  const hn::Rebind<uint32_t, F32> du32;
  const auto bits = hn::PromoteTo(du32, hn::LoadU(du16, reinterpret_cast<const uint16_t*>(p)));
  const auto magnitude = hn::And(bits, hn::Set(du32, 0x7FFFu));
  const V scaled = hn::Mul(hn::BitCast(F32(), hn::ShiftLeft<13>(magnitude)), hn::Set(F32(), 0x1p112f));
  const auto special = hn::Ge(scaled, hn::Set(F32(), 65536.0f));
  const V exponent = hn::IfThenElseZero(special, hn::BitCast(F32(), hn::Set(du32, 0x7F800000u)));
  const V sign = hn::BitCast(F32(), hn::ShiftLeft<16>(hn::AndNot(hn::Set(du32, 0x7FFFu), bits)));
  return hn::Or(hn::Or(scaled, exponent), sign);
#endif
}

// The first n < kLanes elements, then zeros; reads no further.
template <typename W>
HWY_INLINE V WidenPart(const W* p, int64_t n) {
  alignas(64) W part[kLanes] = {};
  std::memcpy(part, p, n % kLanes * sizeof(W));  // the compiler sees the bound
  return Widen(part);
}

HWY_INLINE void StorePart(V v, float* p, int64_t n) {
  alignas(64) float part[kLanes];
  hn::Store(v, F32(), part);
  std::memcpy(p, part, n * sizeof(float));
}

// The first n <= kLanes elements.
HWY_INLINE void StoreFirst(V v, float* p, int64_t n) {
  if (n < kLanes) return StorePart(v, p, n);
  hn::StoreU(v, F32(), p);
}

// term(r, o, left(r), right(o)) for all pairs. The shorter side stays in registers: all of both would not fit.
template <int kLeft, int kRight, typename Left, typename Right, typename Term>
HWY_INLINE void OuterProduct(const Left& left, const Right& right, const Term& term) {
  if constexpr (kLeft <= kRight) {
    decltype(left(0)) a[kLeft];
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) a[i] = left(i);
#pragma GCC unroll 8
    for (int j = 0; j < kRight; ++j) {
      const auto b = right(j);
#pragma GCC unroll 8
      for (int i = 0; i < kLeft; ++i) term(i, j, a[i], b);
    }
  } else {
    OuterProduct<kRight, kLeft>(right, left, [&](int j, int i, auto b, auto a) HWY_ATTR { term(i, j, a, b); });
  }
}

// Two vectors of bfloat16 are widened without a shuffle where the even ones come before the odd ones. What meets them
// lies in the same order (PutInSteps).
template <typename W>
constexpr int kStepVectors = kLanes > 1 && std::is_same_v<W, hwy::bfloat16_t> ? 2 : 1;
template <typename W>
constexpr int64_t kStepInputs = int64_t{kStepVectors<W>} * kLanes;

// Vector number `kVector` of the step at `from`.
template <int kVector, typename W>
HWY_INLINE V WidenOfStep(const W* from) {
  if constexpr (kStepVectors<W> == 2) {
    const hn::RebindToUnsigned<F32> du32;
    const auto pairs = hn::LoadU(du32, reinterpret_cast<const uint32_t*>(from));
    return hn::BitCast(F32(), kVector == 0 ? hn::ShiftLeft<16>(pairs) : hn::And(pairs, hn::Set(du32, 0xFFFF0000u)));
  } else {
    return Widen(from);
  }
}

// The same of a step of which the first n are there; zeros follow, and nothing further is read.
template <int kVector, typename W>
HWY_INLINE V WidenOfPart(const W* from, int64_t n) {
  alignas(64) W part[kStepInputs<W>] = {};
  std::memcpy(part, from, n % kStepInputs<W> * sizeof(W));  // the compiler sees the bound
  return WidenOfStep<kVector>(part);
}

// sum[r][o] += x[r] . w[o] for vector number kVector of the step at k; but for bfloat16, whose x is padded to whole
// steps, x has n inputs as w has.
template <bool kWhole, int kVector, typename W, int kRows, int kOutputs>
HWY_INLINE void DotVector(const W* const (&w)[kOutputs], const float* const (&x)[kRows], int64_t k, int64_t n,
                          V (&sum)[kRows][kOutputs]) {
  constexpr bool kPadded = kWhole || kStepVectors<W> == 2;
  OuterProduct<kRows, kOutputs>(
      [&](int r) HWY_ATTR { return kPadded ? Widen(x[r] + k + kVector * kLanes) : WidenPart(x[r] + k, n); },
      [&](int o) HWY_ATTR { return kWhole ? WidenOfStep<kVector>(w[o] + k) : WidenOfPart<kVector>(w[o] + k, n); },
      [&](int r, int o, V xk, V wk) HWY_ATTR { sum[r][o] = hn::MulAdd(xk, wk, sum[r][o]); });
}

template <bool kWhole, typename W, int kRows, int kOutputs>
HWY_INLINE void DotStep(const W* const (&w)[kOutputs], const float* const (&x)[kRows], int64_t k, int64_t n,
                        V (&sum)[kRows][kOutputs]) {
  DotVector<kWhole, 0>(w, x, k, n, sum);
  if constexpr (kStepVectors<W> == 2) DotVector<kWhole, 1>(w, x, k, n, sum);
}

// sum[r][o] += x[r] . w[o] over n inputs. It fetches ahead, and then into `next`, the rows that will be read after w.
template <typename W, int kRows, int kOutputs>
HWY_INLINE void DotTile(const W* const* w_list, const W* const* next, Turn turn, const float* const (&x)[kRows],
                        int64_t n, V (&sum)[kRows][kOutputs]) {
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(W));
  const int64_t ahead = HWY_MIN(kAheadBytes<kOutputs> / static_cast<int64_t>(sizeof(W)), n);
  const W* w[kOutputs];
  for (int o = 0; o < kOutputs; ++o) w[o] = w_list[o];
  int64_t k = 0, until_mine = turn.turn;
  for (; k + kLine <= n; k += kLine) {
    if (until_mine-- == 0) {
      until_mine = turn.turns - 1;
      for (int o = 0; o < kOutputs; ++o) {
        Prefetch<kStreams<kOutputs>>(k + ahead < n ? w[o] + k + ahead : next[o] + (k + ahead - n));
      }
    }
    for (int64_t i = 0; i < kLine; i += kStepInputs<W>) DotStep<true>(w, x, k + i, kStepInputs<W>, sum);
  }
  for (; k + kStepInputs<W> <= n; k += kStepInputs<W>) DotStep<true>(w, x, k, kStepInputs<W>, sum);
  if (k < n) DotStep<false>(w, x, k, n - k, sum);
}

// The products of a DotJob.
HWY_INLINE int64_t Output(const DotJob& job, int64_t i) { return job.outputs != nullptr ? job.outputs[i] : i; }

HWY_INLINE void Write(const DotJob& job, int64_t row, int64_t output, float product) {
  const float y = product + (job.w->bias.empty() ? 0.0f : job.w->bias.row<float>(0)[output]);
  job.y.row<float>(row)[output] = job.relu && y < 0.0f ? 0.0f : y;
}

// What the sum of integers stands for.
HWY_INLINE float Product(const DotJob& job, int64_t row, int64_t output, int64_t sum) {
  return static_cast<float>(sum) * (job.quantized.scale[row] * job.w->scale.row<float>(0)[output]);
}

// Integers. A vector of int16 holds kPairLanes of them; products of neighbours are added in pairs to int32. The scalar
// target keeps one product a lane.
using I32 = hn::ScalableTag<int32_t>;
using VI32 = hn::Vec<I32>;
using I16 = hn::ScalableTag<int16_t>;
#if HWY_TARGET == HWY_SCALAR
struct VI16 {
  int16_t a, b;
};
constexpr int64_t kPairLanes = 1;
HWY_INLINE VI16 WidenPair(const int8_t* p) { return {*p, 0}; }
HWY_INLINE VI16 WidenPairPart(const int8_t* p, int64_t /*n*/) { return {*p, 0}; }
HWY_INLINE VI16 LoadPair(const int16_t* p) { return {*p, 0}; }
HWY_INLINE VI16 SetPair(int32_t pair) { return {static_cast<int16_t>(pair), static_cast<int16_t>(pair >> 16)}; }
HWY_INLINE VI16 InterleavePairLower(VI16 a, VI16 b) { return {a.a, b.a}; }
HWY_INLINE VI16 InterleavePairUpper(VI16 /*a*/, VI16 /*b*/) { return {0, 0}; }
template <bool kVnni>
HWY_INLINE VI32 AddPairProducts(VI16 a, VI16 b, VI32 sum) {
  return hn::Add(sum, hn::Set(I32(), int32_t{a.a} * b.a + int32_t{a.b} * b.b));
}
constexpr int64_t PairPlace(int64_t column) { return column; }
#else
using VI16 = hn::Vec<I16>;
using I8 = hn::Rebind<int8_t, I16>;
constexpr int64_t kPairLanes = hn::MaxLanes(I16());
HWY_INLINE VI16 WidenPair(const int8_t* p) { return hn::PromoteTo(I16(), hn::LoadU(I8(), p)); }
HWY_INLINE VI16 WidenPairPart(const int8_t* p, int64_t n) {
  alignas(64) int8_t part[kPairLanes] = {};
  std::memcpy(part, p, n % kPairLanes);
  return WidenPair(part);
}
HWY_INLINE VI16 LoadPair(const int16_t* p) { return hn::LoadU(I16(), p); }
HWY_INLINE VI16 SetPair(int32_t pair) { return hn::BitCast(I16(), hn::Set(I32(), pair)); }
HWY_INLINE VI16 InterleavePairLower(VI16 a, VI16 b) { return hn::InterleaveLower(I16(), a, b); }
HWY_INLINE VI16 InterleavePairUpper(VI16 a, VI16 b) { return hn::InterleaveUpper(I16(), a, b); }
// With VNNI in one instruction. It is written out because Highway's target for it asks for more than it needs.
template <bool kVnni>
HWY_INLINE VI32 AddPairProducts(VI16 a, VI16 b, VI32 sum) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (kVnni) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
    return sum;
  }
#elif HWY_TARGET == HWY_AVX2
  if constexpr (kVnni) {
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum.raw) : "x"(a.raw), "x"(b.raw));
    return sum;
  }
#endif
  VI32 unused = hn::Zero(I32());
  VI32 total = hn::ReorderWidenMulAccumulate(I32(), a, b, sum, unused);
  Pin(total);
  return total;
}
// Where a column of a unit lies after the interleaving, which works within 128 bits: 4 columns of each 8 in the lower
// vector, 4 in the upper.
constexpr int64_t PairPlace(int64_t column) { return column / 8 * 4 + column % 4 + (column % 8 >= 4 ? kLanes : 0); }
#endif

// function.operator()<whether VNNI is there>().
template <typename Function>
HWY_INLINE void WithVnni(const Function& function) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
  if (HasVnni(HWY_TARGET)) return function.template operator()<true>();
#endif
  function.template operator()<false>();
}

#if HWY_TARGET == HWY_SCALAR
HWY_INLINE int64_t SumLanes64(VI32 v) { return hn::GetLane(v); }
#else
HWY_INLINE int64_t SumLanes64(VI32 v) {
  const hn::Half<I32> half;
  const hn::Repartition<int64_t, I32> wide;
  return hn::GetLane(hn::SumOfLanes(
      wide, hn::Add(hn::PromoteTo(wide, hn::LowerHalf(half, v)), hn::PromoteTo(wide, hn::UpperHalf(half, v)))));
}
#endif

// A lane's sum of so many inputs fits int32.
constexpr int64_t kIntegerBlock = kQuantizedBlock * kLanes;

// y[r][o] = x[r] . w[o] over `n` <= kIntegerBlock of the `inputs` from `first` on. x is padded with zeros, w is not. It
// fetches ahead, and then into `next`, the rows that will be read after w.
template <bool kVnni, int kRows, int kOutputs>
HWY_INLINE void IntegerDotTile(const int8_t* const (&w)[kOutputs], const int8_t* const (&next)[kOutputs], Turn turn,
                               const int16_t* const (&x)[kRows], int64_t first, int64_t n, int64_t inputs,
                               int64_t (&y)[kRows][kOutputs]) {
  const int64_t ahead = HWY_MIN(kAheadBytes<kOutputs>, inputs), end = first + n;
  // Sums that are added to in turn: with few of them each addition would wait for the one before.
  constexpr int kChains = kLanes > 1 && kRows * kOutputs < 4 ? kLineBytes / kPairLanes : 1;
  VI32 sum[kChains][kRows][kOutputs];
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o) sum[c][r][o] = hn::Zero(I32());
    }
  }
  const auto step = [&](int64_t k, int c) HWY_ATTR {
    OuterProduct<kRows, kOutputs>(
        [&](int r) HWY_ATTR { return LoadPair(x[r] + k); }, [&](int o) HWY_ATTR { return WidenPair(w[o] + k); },
        [&](int r, int o, VI16 xk, VI16 wk) HWY_ATTR { sum[c][r][o] = AddPairProducts<kVnni>(xk, wk, sum[c][r][o]); });
  };
  int64_t k = first, until_mine = turn.turn;
  for (; k + kLineBytes <= end; k += kLineBytes) {
    if (until_mine-- == 0) {
      until_mine = turn.turns - 1;
      for (int o = 0; o < kOutputs; ++o) {
        Prefetch<kStreams<kOutputs>>(k + ahead < inputs ? w[o] + k + ahead : next[o] + (k + ahead - inputs));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < static_cast<int>(kLineBytes / kPairLanes); ++i) step(k + i * kPairLanes, i % kChains);
  }
  for (; k + kPairLanes <= end; k += kPairLanes) step(k, 0);
  if (k < end) {
    OuterProduct<kRows, kOutputs>([&](int r) HWY_ATTR { return LoadPair(x[r] + k); },
                                  [&](int o) HWY_ATTR { return WidenPairPart(w[o] + k, end - k); },
                                  [&](int r, int o, VI16 xk, VI16 wk)
                                      HWY_ATTR { sum[0][r][o] = AddPairProducts<kVnni>(xk, wk, sum[0][r][o]); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) sum[0][r][o] = hn::Add(sum[0][r][o], sum[c][r][o]);
      y[r][o] = SumLanes64(sum[0][r][o]);
    }
  }
}

// Whether rows by themselves, each with the products that it needs, take less time than all products in tiles: a tile
// of one row is half as fast, and lists of its own cost something.
HWY_INLINE bool BetterApart(int64_t needed, int64_t all) { return needed * 3 < all; }

// Calls function.template Tile<n>(first) for tiles of n <= kRows rows: as many of kRows as fit, then one of the rest. A
// single row does not remain, since that costs nearly as much as two.
template <int kRows, typename Function>
HWY_INLINE void ForRowTiles(int64_t rows, const Function& function, int64_t first = 0) {
  for (; rows - first >= kRows && (kRows < 3 || rows - first != kRows + 1); first += kRows) {
    function.template Tile<kRows>(first);
  }
  if constexpr (kRows > 1) ForRowTiles<kRows - 1>(rows, function, first);
}

}  // namespace dejavu::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
