// Which outputs a row selects: one comparison of a sum with its threshold, one bit each. The sums are integers, exact,
// so a row's bits depend neither on the other rows nor on the target.
#include <algorithm>

#include "kernels/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/select.cc"
#include "hwy/foreach_target.h"

// What follows is included once for each target, so it stays below foreach_target.h.
#include "kernels/cpu/tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dejavu::cpu::HWY_NAMESPACE {

// Bit i: sums[i] > thresholds[i], of 32.
uint32_t WordOf(const float* sums, const hwy::float16_t* thresholds) {
  uint32_t word = 0;
  for (int64_t i = 0; i < 32; i += kLanes) {
    alignas(8) uint8_t bytes[8] = {};
    hn::StoreMaskBits(F32(), hn::Gt(hn::LoadU(F32(), sums + i), Widen(thresholds + i)), bytes);
    uint32_t bits;
    std::memcpy(&bits, bytes, sizeof bits);
    word |= bits << i;
  }
  return word;
}

void Compare(const SelectJob& job, int64_t r, const float* sums, int64_t first, int64_t last) {
  const hwy::float16_t* thresholds = job.w.thresholds.row<hwy::float16_t>(job.points[r]);
  for (int64_t c = first; c < last; c += 32) {
    job.masks.row<int32_t>(r)[c / 32] = static_cast<int32_t>(WordOf(sums + c - first, thresholds + c));
  }
}

}  // namespace dejavu::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dejavu::cpu {

HWY_EXPORT(Compare);

void SelectColumns(const SelectJob& job, int64_t first, int64_t last, float* scratch) {
  const auto compare = HWY_DYNAMIC_DISPATCH(Compare);
  for (int64_t s = 0; s < job.sums.segments; ++s) SumSegment(job.sums, s, first, last, scratch);
  JoinSegments(job.sums, first, last, scratch);
  for (int64_t r = 0; r < job.sums.x.rows; ++r) {
    if (job.points[r] == kSelectEverything) {
      for (int64_t c = first; c < last; c += 32) {
        const int64_t left = job.w.outputs - c;
        job.masks.row<uint32_t>(r)[c / 32] = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
      }
    } else {
      compare(job, r, job.sums.y.row<float>(r) + first, first, last);
    }
  }
}

}  // namespace dejavu::cpu
#endif
