// Which outputs a row selects: sums over a few coordinates for a block of outputs in registers, one comparison with the
// thresholds, one bit each. The rows of b are read once per block for all rows of the step. Every output has one
// accumulator that goes through the coordinates in order, so a row's bits do not depend on the other rows.
#include "kernels/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/select.cc"
#include "hwy/foreach_target.h"

// What follows is included once for each target, so it stays below foreach_target.h.
#include "kernels/cpu/tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dejavu::cpu::HWY_NAMESPACE {

// Outputs that accumulate side by side: a register each, or as many as a block has.
constexpr int64_t kGroupVectors = kSelectorPadding / kLanes < 8 ? kSelectorPadding / kLanes : 8;
constexpr int64_t kGroup = kGroupVectors * kLanes;
static_assert(kSelectorPadding % kGroup == 0);

// One bit per lane where sum > threshold, at bit `column` % 32 of its word; words start out as zero.
HWY_INLINE void SetBits(V sum, V threshold, int64_t column, uint32_t* words) {
  alignas(8) uint8_t bytes[8] = {};
  hn::StoreMaskBits(F32(), hn::Gt(sum, threshold), bytes);
  uint32_t bits;
  std::memcpy(&bits, bytes, sizeof bits);
  words[column / 32] |= bits << (column % 32);
}

void SelectGroup(const SelectJob& job, int64_t r, int32_t point, int64_t column) {
  const int64_t rank = job.w.ranks.row<int32_t>(0)[point];
  const float* a = job.a.row<float>(r);
  V sum[kGroupVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kGroupVectors; ++v) sum[v] = hn::Zero(F32());
  for (int64_t k = 0; k < rank; ++k) {
    const int8_t* b = job.w.b.row<int8_t>(k) + column;
    const V ak = hn::Set(F32(), a[k]);
#pragma GCC unroll 8
    for (int v = 0; v < kGroupVectors; ++v) sum[v] = hn::MulAdd(ak, Widen(b + v * kLanes), sum[v]);
  }
  const hwy::float16_t* threshold = job.w.thresholds.row<hwy::float16_t>(point) + column;
  auto* words = reinterpret_cast<uint32_t*>(job.masks.row<int32_t>(r));
  for (int v = 0; v < kGroupVectors; ++v) {
    SetBits(sum[v], Widen(threshold + v * kLanes), column + v * kLanes, words);
  }
}

// The outputs of word `word` that are not padding.
uint32_t FullWord(int64_t outputs, int64_t word) {
  const int64_t left = outputs - word * 32;
  return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
}

void SelectBlocks(const SelectJob& job, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    for (int64_t r = 0; r < job.a.rows; ++r) {
      for (int64_t w = block * kBlockWords; w < (block + 1) * kBlockWords; ++w) {
        const uint32_t word = job.points[r] == kSelectEverything ? FullWord(job.w.outputs, w) : 0;
        job.masks.row<int32_t>(r)[w] = static_cast<int32_t>(word);
      }
      if (job.points[r] == kSelectEverything) continue;
      for (int64_t c = block * kSelectorPadding; c < (block + 1) * kSelectorPadding; c += kGroup) {
        SelectGroup(job, r, job.points[r], c);
      }
    }
  }
}

}  // namespace dejavu::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dejavu::cpu {

HWY_EXPORT(SelectBlocks);

void SelectBlocks(const SelectJob& job, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(SelectBlocks)(job, first, last);
}

}  // namespace dejavu::cpu
#endif
