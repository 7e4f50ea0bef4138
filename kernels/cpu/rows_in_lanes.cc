// Products where an output is a row of the weight, for many rows of x: they lie side by side, in the lanes of a vector,
// and a weight is broadcast to them. What would be the lanes of a row's accumulator in dot.cc are accumulators of their
// own here, so the sums are the same, bit by bit. A block of some outputs is widened once, into L1, for all rows.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rows_in_lanes.cc"
#include "hwy/foreach_target.h"

// What follows is included once for each target, so it stays below foreach_target.h.
#include "kernels/cpu/tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dejavu::cpu::HWY_NAMESPACE {

constexpr int64_t kGroupOutputs = 48;
constexpr int64_t kBlockRows = 96;     // whose sums, for a group, fit L2
constexpr int64_t kStep = 2 * kLanes;  // inputs are padded with zeros to whole steps
// Outputs of a tile of one vector of rows, twice those of two: what 16 registers hold, or 32 with AVX-512.
constexpr int64_t kTileOutputs = HWY_TARGET <= HWY_AVX3 ? 24 : 12;
constexpr int64_t kPanelFloats = kTileOutputs * kLaneInputs;
static_assert(kLaneInputs % kStep == 0 && kBlockRows % kStep == 0);
static_assert((kPanelFloats + kGroupOutputs * kBlockRows * kLanes) * int64_t{sizeof(float)} <= kScratchBytes);

// Calls function.operator()<kVectors>(r) for each tile of rows: two vectors, and for the last ones perhaps one.
template <typename Function>
HWY_INLINE void ForRowTiles(int64_t rows, const Function& function) {
  const int64_t padded = RoundUp(rows, kLanes);
  int64_t r = 0;
  for (; r + 2 * kLanes <= padded; r += 2 * kLanes) function.template operator()<2>(r);
  if (r < padded) function.template operator()<1>(r);
}

// Two bfloat16 are widened without a shuffle where the even ones of a step may come before the odd ones.
template <typename W>
constexpr bool kEvenOdd = std::is_same_v<W, hwy::bfloat16_t>&& kLanes > 1;

template <typename W>
HWY_INLINE void WidenStep(const W* from, float* to) {
  if constexpr (kEvenOdd<W>) {
    const hn::RebindToUnsigned<F32> du32;
    const auto pairs = hn::LoadU(du32, reinterpret_cast<const uint32_t*>(from));
    hn::Store(hn::BitCast(F32(), hn::ShiftLeft<16>(pairs)), F32(), to);
    hn::Store(hn::BitCast(F32(), hn::And(pairs, hn::Set(du32, 0xFFFF0000u))), F32(), to + kLanes);
  } else {
    hn::Store(Widen(from), F32(), to);
    hn::Store(Widen(from + kLanes), F32(), to + kLanes);
  }
}

// The sums of a tile, [lane][row] for each output and `stride` apart, and a block of inputs: the weights are a panel, x
// is [lane][inputs / kLanes][row], where input kLanes * j + l is number j of lane l. Not inlined: within a larger
// function g++ 12 spills its registers.
template <bool kWeightsEvenOdd, int kVectors, int kOutputs>
HWY_NOINLINE void LaneTile(const float* w, const float* x, int64_t inputs, bool fresh, float* sums, int64_t stride) {
  constexpr int64_t kRows = kVectors * kLanes;
  constexpr int64_t kSecond = kWeightsEvenOdd ? kLanes / 2 : kLanes;  // of a lane, in a step
  for (int64_t l = 0; l < kLanes; ++l, sums += kRows) {
    V sum[kVectors][kOutputs];
#pragma GCC unroll 24
    for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sum[v][o] = fresh ? hn::Zero(F32()) : hn::Load(F32(), sums + o * stride + v * kLanes);
      }
    }
    const float* wk = w + (kWeightsEvenOdd ? l % 2 * kLanes + l / 2 : l);
    const auto step = [&](const float* from, const float* rows) HWY_ATTR {
      V xv[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) xv[v] = hn::Load(F32(), rows + v * kLanes);
#pragma GCC unroll 24
      for (int o = 0; o < kOutputs; ++o) {
        const V wo = hn::Set(F32(), from[o * kLaneInputs]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[v][o] = hn::MulAdd(wo, xv[v], sum[v][o]);
      }
    };
    for (int64_t k = 0; k < inputs; k += kStep, wk += kStep, x += 2 * kRows) {
      step(wk, x);
      step(wk + kSecond, x + kRows);
    }
#pragma GCC unroll 24
    for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) hn::Store(sum[v][o], F32(), sums + o * stride + v * kLanes);
    }
  }
}

template <typename W>
class LaneRun {
 public:
  LaneRun(const DotJob& job, int64_t first, int64_t last, float* scratch)
      : job_(job),
        first_(first),
        last_(last),
        sums_stride_(RoundUp(std::min(job.x.rows, kBlockRows), kLanes) * kLanes),
        panel_(scratch),
        sums_(scratch + kPanelFloats) {}

  void Run() {
    for (int64_t row = 0; row < job_.x.rows; row += kBlockRows) {
      for (int64_t first = first_; first < last_; first += kGroupOutputs) {
        Group(row, std::min(kBlockRows, job_.x.rows - row), first, std::min(kGroupOutputs, last_ - first));
      }
    }
  }

 private:
  const W* Weights(int64_t i) const { return job_.w->weight.template row<W>(Output(job_, std::min(i, last_ - 1))); }

  void Group(int64_t row, int64_t rows, int64_t first, int64_t count) {
    const int64_t inputs = job_.x.cols, panel = rows > kLanes ? kTileOutputs / 2 : kTileOutputs;
    for (int64_t input = 0; input < inputs; input += kLaneInputs) {
      const int64_t n = std::min(kLaneInputs, inputs - input);
      const bool last = input + n == inputs;
      for (int64_t i = 0; i < count; i += panel) {
        const int64_t outputs = std::min(panel, count - i);
        for (int64_t o = 0; o < outputs; ++o) {
          const int64_t at = first + i + o;
          // Meanwhile comes what is widened when the others of the group have been.
          const W* next = last ? Weights(at + count) : Weights(at) + input + n;
          WidenRow(Weights(at) + input, n, next, panel_ + o * kLaneInputs);
        }
        Block(row, rows, outputs, input, n, sums_ + i * sums_stride_);
      }
    }
    ForRowTiles(rows, [&]<int kVectors>(int64_t r) HWY_ATTR { Finish<kVectors>(row, rows, r, first, count); });
  }

  static void WidenRow(const W* from, int64_t n, const W* next, float* to) {
    constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(W)), kSteps = HWY_MAX(kLine, kStep);
    int64_t k = 0;
    for (; k + kSteps <= n; k += kSteps) {
      for (int64_t i = 0; i < kSteps; i += kLine) Prefetch(next + k + i);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kSteps; i += kStep) WidenStep(from + k + i, to + k + i);
    }
    for (; k + kStep <= n; k += kStep) WidenStep(from + k, to + k);
    if (k == n) return;
    alignas(64) W part[kStep] = {};
    std::memcpy(part, from + k, (n - k) % kStep * sizeof(W));
    WidenStep(part, to + k);
  }

  // A block of inputs for the outputs that are in the panel.
  void Block(int64_t row, int64_t rows, int64_t outputs, int64_t input, int64_t n, float* sums) {
    const int64_t padded = RoundUp(n, kStep);
    const float* x = job_.in_lanes + input * RoundUp(job_.x.rows, kLanes) + row * padded;
    ForRowTiles(rows, [&]<int kVectors>(int64_t r) HWY_ATTR {
      int64_t o = 0;
      const auto tiles = [&]<int kOutputs>() HWY_ATTR {
        for (; o + kOutputs <= outputs; o += kOutputs) {
          LaneTile<kEvenOdd<W>, kVectors, kOutputs>(panel_ + o * kLaneInputs, x + r * padded, padded, input == 0,
                                                    sums + o * sums_stride_ + r * kLanes, sums_stride_);
        }
      };
      if constexpr (kVectors == 1) tiles.template operator()<kTileOutputs>();
      tiles.template operator()<kTileOutputs / 2>();
      tiles.template operator()<2>();
      tiles.template operator()<1>();
    });
  }

  // The rows of the tile at r; lanes are added as SumLanes adds them.
  template <int kVectors>
  void Finish(int64_t row, int64_t rows, int64_t r, int64_t first, int64_t count) {
    float products[kGroupOutputs][kVectors * kLanes];
    for (int64_t i = 0; i < count; ++i) {
      const float* sums = sums_ + i * sums_stride_ + r * kLanes;
      for (int64_t v = 0; v < kVectors; ++v) {
        V lane[kLanes];
#pragma GCC unroll 16
        for (int64_t l = 0; l < kLanes; ++l) lane[l] = hn::Load(F32(), sums + (l * kVectors + v) * kLanes);
#pragma GCC unroll 4
        for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
          for (int64_t l = 0; l < half; ++l) lane[l] = hn::Add(lane[l], lane[l + half]);
        }
        hn::StoreU(lane[0], F32(), products[i] + v * kLanes);
      }
    }
    for (int64_t a = 0; a < std::min(kVectors * kLanes, rows - r); ++a) {
      for (int64_t i = 0; i < count; ++i) Write(job_, row + r + a, Output(job_, first + i), products[i][a]);
    }
  }

  const DotJob& job_;
  const int64_t first_, last_;
  const int64_t sums_stride_;  // from output to output
  float* const panel_;         // [kTileOutputs][kLaneInputs] widened weights
  float* const sums_;          // [kGroupOutputs][tiles of rows][kLanes][rows of the tile]
};

void LaneProducts(const DotJob& job, int64_t first, int64_t last, float* scratch) {
  switch (job.w->weight.dtype) {
    case DType::kFloat32:
      return LaneRun<float>(job, first, last, scratch).Run();
    case DType::kFloat16:
      return LaneRun<hwy::float16_t>(job, first, last, scratch).Run();
    case DType::kBFloat16:
      return LaneRun<hwy::bfloat16_t>(job, first, last, scratch).Run();
    default:
      CHECK(false) << "weights of type " << Name(job.w->weight.dtype);
  }
}

void PutInLanes(const Tensor& x, int64_t first, int64_t last, float* to) {
  for (int64_t input = first * kLaneInputs; input < std::min(last * kLaneInputs, x.cols); input += kLaneInputs) {
    const int64_t n = std::min(kLaneInputs, x.cols - input), padded = RoundUp(n, kStep), number = padded / kLanes;
    float* block = to + input * RoundUp(x.rows, kLanes);
    ForRowTiles(x.rows, [&]<int kVectors>(int64_t r) HWY_ATTR {
      constexpr int64_t kRows = kVectors * kLanes;
      float* tile = block + r * padded;
      if (n < padded || x.rows - r < kRows) std::fill_n(tile, kRows * padded, 0.0f);
      for (int64_t a = 0; a < std::min(kRows, x.rows - r); ++a) {
        const float* from = x.row<float>(r + a) + input;
        for (int64_t i = 0; i < n; ++i) tile[(i % kLanes * number + i / kLanes) * kRows + a] = from[i];
      }
    });
  }
}

int64_t LaneFloats(int64_t rows, int64_t inputs) {
  const int64_t padded = RoundUp(rows, kLanes);
  return rows < 4 || 8 * rows < 7 * padded ? 0 : padded * RoundUp(inputs, kStep);
}

}  // namespace dejavu::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dejavu::cpu {

HWY_EXPORT(PutInLanes);
HWY_EXPORT(LaneFloats);
HWY_EXPORT(LaneProducts);

int64_t LaneFloats(int64_t rows, int64_t inputs) { return HWY_DYNAMIC_DISPATCH(LaneFloats)(rows, inputs); }

void PutInLanes(const Tensor& x, int64_t first, int64_t last, float* to) {
  HWY_DYNAMIC_DISPATCH(PutInLanes)(x, first, last, to);
}

void LaneProducts(const DotJob& job, int64_t first, int64_t last, float* scratch) {
  HWY_DYNAMIC_DISPATCH(LaneProducts)(job, first, last, scratch);
}

}  // namespace dejavu::cpu
#endif
