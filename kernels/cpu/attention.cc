// Attention with a running softmax (Milakov and Gimelshein 2018; FlashAttention): positions come in tiles of 64 counted
// from the start of the sequence, whatever the blocks are; a tile that raises the maximum scales down what was summed
// so far. The keys of a block lie transposed, so that the scores of neighbouring positions are computed side by side.
// Rows of one sequence go through a tile together while it is in the cache.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/base/float16.h"
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

// Up to kTilePositions positions of one head of one sequence.
template <typename T>
struct KvTile {
  const T* keys[kTilePositions];    // by block: [head_dim][block_tokens], the whole of it
  int32_t places[kTilePositions];   // by block: within the tile, the first position in it
  int32_t offsets[kTilePositions];  // and within the block, the same
  int32_t blocks = 0;
  const T* values[kTilePositions];  // by position: [head_dim]
  int32_t positions = 0;
};

template <typename T>
void FillTile(const AttentionJob& job, const int32_t* table, int64_t head, int32_t start, int32_t end,
              KvTile<T>* tile) {
  const KvLayer& kv = job.kv;
  const int64_t block_elements = int64_t{kv.block_tokens} * kv.head_dim;
  tile->blocks = tile->positions = 0;
  while (start + tile->positions < end && tile->positions < kTilePositions) {
    const int32_t position = start + tile->positions, offset = position % kv.block_tokens;
    const int64_t at = (int64_t{table[position / kv.block_tokens]} * kv.heads + head) * block_elements;
    tile->keys[tile->blocks] = static_cast<const T*>(kv.keys) + at;
    tile->places[tile->blocks] = tile->positions;
    tile->offsets[tile->blocks++] = offset;
    const int32_t limit = std::min<int32_t>(end - start, kTilePositions);
    for (int32_t o = offset; o < kv.block_tokens && tile->positions < limit; ++o) {
      tile->values[tile->positions++] = static_cast<const T*>(kv.values) + at + int64_t{o} * kv.head_dim;
    }
  }
}

// scores[i] of `n` positions of a block, side by side: even and odd features apart, then together. `next` is fetched.
template <int kVectors, typename T>
HWY_INLINE void ScoreVectors(const float* q, int64_t head_dim, const T* keys, int64_t stride, int64_t n, const T* next,
                             float scale, float* scores) {
  V sum[2][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sum[0][v] = sum[1][v] = hn::Zero(F32());
  const auto step = [&](int64_t d, V* to) HWY_ATTR {
    const T* k = keys + d * stride;
    if (next != nullptr) Prefetch(next + d * stride);
    const V qd = hn::Set(F32(), q[d]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const V kd = kVectors > 1 || n >= kLanes ? Widen(k + v * kLanes) : WidenPart(k, n);
      to[v] = hn::MulAdd(qd, kd, to[v]);
    }
  };
  int64_t d = 0;
  for (; d + 2 <= head_dim; d += 2) {
    step(d, sum[0]);
    step(d + 1, sum[1]);
  }
  if (d < head_dim) step(d, sum[0]);
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    hn::StoreU(hn::Mul(hn::Add(sum[0][v], sum[1][v]), hn::Set(F32(), scale)), F32(), scores + v * kLanes);
  }
}

// Of the first n positions of the tile; `scores` has room for a vector more.
template <typename T>
HWY_INLINE void Scores(const AttentionJob& job, const float* q, const KvTile<T>& tile, int64_t n, const KvTile<T>* next,
                       float* scores) {
  const int64_t stride = job.kv.block_tokens, head_dim = job.kv.head_dim;
  for (int32_t b = 0; b < tile.blocks; ++b) {
    const int64_t first = tile.places[b], offset = tile.offsets[b];
    const int64_t end = std::min<int64_t>(n, b + 1 < tile.blocks ? tile.places[b + 1] : tile.positions);
    const T* const ahead = next != nullptr && b < next->blocks ? next->keys[b] : nullptr;
    int64_t i = first;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      ScoreVectors<2>(q, head_dim, tile.keys[b] + offset + i - first, stride, 2 * kLanes,
                      ahead != nullptr ? ahead + i - first : nullptr, job.scale, scores + i);
    }
    for (; i < end; i += kLanes) {
      ScoreVectors<1>(q, head_dim, tile.keys[b] + offset + i - first, stride, end - i,
                      ahead != nullptr ? ahead + i - first : nullptr, job.scale, scores + i);
    }
  }
}

// context += sum over n positions of weights[i] * values[i], kVectors vectors from `column` on.
template <int kVectors, typename T>
HWY_INLINE void AddValues(const float* weights, const KvTile<T>& tile, int64_t n, const KvTile<T>* next, int64_t column,
                          float* context) {
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(T));
  V sum[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sum[v] = hn::LoadU(F32(), context + column + v * kLanes);
  for (int64_t i = 0; i < n; ++i) {
    if (next != nullptr && i < next->positions) {
      for (int64_t c = 0; c < kVectors * kLanes; c += kLine) Prefetch(next->values[i] + column + c);
    }
    const V weight = hn::Set(F32(), weights[i]);
    const T* from = tile.values[i] + column;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v] = hn::MulAdd(weight, Widen(from + v * kLanes), sum[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[v], F32(), context + column + v * kLanes);
}

// The last `columns` < kLanes.
template <typename T>
HWY_INLINE void AddLastValues(const float* weights, const KvTile<T>& tile, int64_t n, int64_t column, int64_t columns,
                              float* context) {
  V sum = WidenPart(context + column, columns);
  for (int64_t i = 0; i < n; ++i) {
    sum = hn::MulAdd(hn::Set(F32(), weights[i]), WidenPart(tile.values[i] + column, columns), sum);
  }
  StorePart(sum, context + column, columns);
}

template <typename T>
HWY_INLINE void AttendTile(const AttentionJob& job, const float* q, const KvTile<T>& tile, int64_t n,
                           const KvTile<T>* next, Softmax& softmax, float* context) {
  const int64_t head_dim = job.kv.head_dim;
  alignas(64) float scores[kTilePositions + 2 * kLanes];
  Scores(job, q, tile, n, next, scores);
  const float rescale = Accumulate(scores, n, softmax);
  for (int64_t d = 0; d < head_dim; ++d) context[d] *= rescale;
  int64_t c = 0;
  for (; c + 8 * kLanes <= head_dim; c += 8 * kLanes) AddValues<8>(scores, tile, n, next, c, context);
  for (; c + 2 * kLanes <= head_dim; c += 2 * kLanes) AddValues<2>(scores, tile, n, next, c, context);
  for (; c + kLanes <= head_dim; c += kLanes) AddValues<1>(scores, tile, n, next, c, context);
  if (c < head_dim) AddLastValues(scores, tile, n, c, head_dim - c, context);
}

template <typename T>
void AttendOf(const AttentionJob& job, int64_t first, int64_t last, int64_t head, int64_t next_head) {
  const KvLayer& kv = job.kv;
  const int32_t* positions = job.rows.positions.row<int32_t>(0);
  const int32_t* table = job.rows.block_table.row<int32_t>(job.rows.sequences.row<int32_t>(0)[first]);
  const int32_t end = *std::max_element(positions + first, positions + last) + 1;
  const int64_t column = head * kv.head_dim;
  Softmax softmax[kAttentionRows];
  for (int64_t r = first; r < last; ++r) std::fill_n(job.context.row<float>(r) + column, kv.head_dim, 0.0f);

  // While a tile is computed, the one after it is fetched; after the last, the first of the head that comes next.
  KvTile<T> tiles[2];
  FillTile(job, table, head, 0, end, &tiles[0]);
  for (int32_t start = 0; start < end; start += kTilePositions) {
    const KvTile<T>& tile = tiles[start / kTilePositions % 2];
    KvTile<T>& next = tiles[1 - start / kTilePositions % 2];
    const bool more = start + kTilePositions < end, another = more || next_head >= 0;
    if (another) FillTile(job, table, more ? head : next_head, more ? start + kTilePositions : 0, end, &next);
    bool fetch = another;
    for (int64_t r = first; r < last; ++r) {
      const int32_t n = std::min(tile.positions, positions[r] + 1 - start);
      if (n <= 0) continue;
      AttendTile(job, job.qkv.row<float>(r) + column, tile, n, fetch ? &next : nullptr, softmax[r - first],
                 job.context.row<float>(r) + column);
      fetch = false;
    }
  }
  for (int64_t r = first; r < last; ++r) {
    float* context = job.context.row<float>(r) + column;
    for (int64_t d = 0; d < kv.head_dim; ++d) context[d] /= softmax[r - first].sum;
  }
}

void Attend(const AttentionJob& job, int64_t first, int64_t last, int64_t head, int64_t next_head) {
  if (job.kv.dtype == DType::kFloat16) return AttendOf<hwy::float16_t>(job, first, last, head, next_head);
  AttendOf<float>(job, first, last, head, next_head);
}

// Both return how many of the numbers are beyond the range of the type.
int64_t Narrow(const float* from, int64_t n, float* to) {
  std::copy_n(from, n, to);
  return 0;
}

int64_t Narrow(const float* from, int64_t n, hwy::float16_t* to) {
  constexpr float kMost = 65504.0f;
  int64_t i = 0, beyond = 0;
#if HWY_TARGET <= HWY_AVX2  // Highway's own emulation does not know NaN
  const hn::Rebind<hwy::float16_t, F32> df16;
  const V most = hn::Set(F32(), kMost);
  for (; i + kLanes <= n; i += kLanes) {
    const V v = hn::LoadU(F32(), from + i);
    const auto is_beyond = hn::Gt(hn::Abs(v), most);  // false for NaN, which stays
    beyond += static_cast<int64_t>(hn::CountTrue(F32(), is_beyond));
    hn::StoreU(hn::DemoteTo(df16, hn::IfThenElse(is_beyond, hn::CopySign(most, v), v)), df16, to + i);
  }
#endif
  for (; i < n; ++i) {
    beyond += std::abs(from[i]) > kMost;
    to[i].bits = Float16FromFloat(std::clamp(from[i], -kMost, kMost));
  }
  return beyond;
}

template <typename T>
int64_t StoreKvOf(const KvLayer& kv, int64_t block, int64_t place, const float* keys, const float* values) {
  constexpr int64_t kFeatures = 64;
  int64_t beyond = 0;
  for (int64_t head = 0; head < kv.heads; ++head) {
    const int64_t at = (block * kv.heads + head) * kv.block_tokens * kv.head_dim;
    T* to = static_cast<T*>(kv.keys) + at + place;
    for (int64_t first = 0; first < kv.head_dim; first += kFeatures) {
      const int64_t n = std::min(kFeatures, kv.head_dim - first);
      T narrow[kFeatures];
      beyond += Narrow(keys + head * kv.head_dim + first, n, narrow);
      for (int64_t d = 0; d < n; ++d) to[(first + d) * kv.block_tokens] = narrow[d];
    }
    beyond += Narrow(values + head * kv.head_dim, kv.head_dim, static_cast<T*>(kv.values) + at + place * kv.head_dim);
  }
  return beyond;
}

int64_t StoreKv(const KvLayer& kv, int64_t block, int64_t place, const float* keys, const float* values) {
  if (kv.dtype == DType::kFloat16) return StoreKvOf<hwy::float16_t>(kv, block, place, keys, values);
  return StoreKvOf<float>(kv, block, place, keys, values);
}

}  // namespace dejavu::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dejavu::cpu {

HWY_EXPORT(Attend);
HWY_EXPORT(StoreKv);

int64_t StoreKv(const KvLayer& kv, int64_t block, int64_t place, const float* keys, const float* values) {
  return HWY_DYNAMIC_DISPATCH(StoreKv)(kv, block, place, keys, values);
}

void Attend(const AttentionJob& job, int64_t first, int64_t last, int64_t head, int64_t next_head) {
  HWY_DYNAMIC_DISPATCH(Attend)(job, first, last, head, next_head);
}

}  // namespace dejavu::cpu
#endif
