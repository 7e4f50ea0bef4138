// Attention with a running softmax (Milakov and Gimelshein 2018; FlashAttention): positions come in tiles of 64 counted
// from the start of the sequence, whatever the blocks are; a tile that raises the maximum scales down what was summed
// so far. K and V are read as listed rows of the matrix [blocks * heads * block_tokens, head_dim], so scores are dot
// products and the context is a sum of rows. Rows of one sequence go through a tile together while it is in the cache.
#include <algorithm>
#include <limits>

#include "kernels/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cc"
#include "hwy/foreach_target.h"

// What follows is included once for each target, so it stays below foreach_target.h.
#include "hwy/contrib/math/math-inl.h"
#include "kernels/cpu/tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dejavu::cpu::HWY_NAMESPACE {

constexpr int64_t kTilePositions = 64;

// exp(x) for x <= 0; NaN stays NaN.
HWY_INLINE V ExpOf(V x) {
  const V clamped = hn::Max(x, hn::Set(F32(), -104.0f));
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(F32(), clamped));
}

struct Softmax {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0.0f;
};

// Replaces the scores by exp(score - maximum) and adds them to the sum; returns what earlier terms are to be scaled by.
// `scores` has room for kTilePositions, of which n are given.
HWY_INLINE float Accumulate(float* scores, int64_t n, Softmax& softmax) {
  std::fill(scores + n, scores + kTilePositions, -std::numeric_limits<float>::infinity());
  V max = hn::Set(F32(), softmax.max);
  for (int64_t i = 0; i < kTilePositions; i += kLanes) max = hn::Max(max, hn::Load(F32(), scores + i));
  const V all = hn::MaxOfLanes(F32(), max);
  V sum = hn::Zero(F32());
  for (int64_t i = 0; i < n; i += kLanes) {
    const V e = ExpOf(hn::Sub(hn::Load(F32(), scores + i), all));
    const V valid = hn::IfThenElseZero(hn::FirstN(F32(), std::min(n - i, kLanes)), e);
    hn::Store(valid, F32(), scores + i);
    sum = hn::Add(sum, valid);
  }
  const float scale = hn::GetLane(ExpOf(hn::Sub(hn::Set(F32(), softmax.max), all)));
  softmax.max = hn::GetLane(all);
  softmax.sum = softmax.sum * scale + hn::GetLane(hn::SumOfLanes(F32(), sum));
  return scale;
}

template <int kOutputs>
HWY_INLINE void Scores(const float* q, const float* keys, const int32_t* places, int64_t head_dim, float scale,
                       float* scores) {
  const float* k[kOutputs];
  for (int i = 0; i < kOutputs; ++i) k[i] = keys + places[i] * head_dim;
  const float* const x[1] = {q};
  V sum[1][kOutputs];
  for (int i = 0; i < kOutputs; ++i) sum[0][i] = hn::Zero(F32());
  DotTile<float, 1, kOutputs>(k, nullptr, x, head_dim, sum);
  for (int i = 0; i < kOutputs; ++i) scores[i] = hn::GetLane(hn::SumOfLanes(F32(), sum[0][i])) * scale;
}

HWY_INLINE void AttendTile(const AttentionJob& job, const float* q, const int32_t* places, int64_t n, Softmax& softmax,
                           float* context) {
  const int64_t head_dim = job.kv.head_dim;
  const float* keys = static_cast<const float*>(job.kv.keys);
  alignas(64) float scores[kTilePositions];
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) Scores<4>(q, keys, places + i, head_dim, job.scale, scores + i);
  for (; i < n; ++i) Scores<1>(q, keys, places + i, head_dim, job.scale, scores + i);
  const float rescale = Accumulate(scores, n, softmax);
  for (int64_t d = 0; d < head_dim; ++d) context[d] *= rescale;
  const float* values = static_cast<const float*>(job.kv.values);
  AddColumns<float, 1>({scores, 0, nullptr, values, head_dim, places, n}, 0, head_dim, context, 0);
}

void Attend(const AttentionJob& job, int64_t first, int64_t last, int64_t head) {
  const KvLayer& kv = job.kv;
  const int32_t* positions = job.rows.positions.row<int32_t>(0);
  const int32_t* blocks = job.rows.block_table.row<int32_t>(job.rows.sequences.row<int32_t>(0)[first]);
  const int32_t end = *std::max_element(positions + first, positions + last) + 1;
  const int64_t column = head * kv.head_dim;
  Softmax softmax[kAttentionRows];
  for (int64_t r = first; r < last; ++r) std::fill_n(job.context.row<float>(r) + column, kv.head_dim, 0.0f);

  for (int32_t start = 0; start < end; start += kTilePositions) {
    const int32_t count = std::min<int32_t>(kTilePositions, end - start);
    int32_t places[kTilePositions];
    for (int32_t i = 0; i < count; ++i) {
      const int32_t position = start + i;
      places[i] = (blocks[position / kv.block_tokens] * kv.heads + head) * kv.block_tokens + position % kv.block_tokens;
    }
    for (int64_t r = first; r < last; ++r) {
      const int32_t n = std::min(count, positions[r] + 1 - start);
      if (n <= 0) continue;
      AttendTile(job, job.qkv.row<float>(r) + column, places, n, softmax[r - first],
                 job.context.row<float>(r) + column);
    }
  }
  for (int64_t r = first; r < last; ++r) {
    float* context = job.context.row<float>(r) + column;
    for (int64_t d = 0; d < kv.head_dim; ++d) context[d] /= softmax[r - first].sum;
  }
}

}  // namespace dejavu::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dejavu::cpu {

HWY_EXPORT(Attend);

void Attend(const AttentionJob& job, int64_t first, int64_t last, int64_t head) {
  HWY_DYNAMIC_DISPATCH(Attend)(job, first, last, head);
}

}  // namespace dejavu::cpu
#endif
