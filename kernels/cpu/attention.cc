// Attention with a running softmax (Milakov and Gimelshein 2018; FlashAttention): positions come in tiles of 64 counted
// from the start of the sequence, whatever the blocks are; a tile that raises the maximum scales down what was summed
// so far. The keys of a block lie transposed, so that the scores of neighbouring positions are computed side by side.
// Rows of one sequence go through a tile together while it is in the cache, and one head after the other through the
// same positions: heads of a block lie side by side in memory.
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

// Positions of a tile that lie in one block.
template <typename T>
struct KvPiece {
  const T* keys;    // [heads, head_dim, block_tokens] from the first of them on
  const T* values;  // [heads, block_tokens, head_dim], the same
  int32_t place;    // the first of them in the tile
  int32_t positions;
};

template <typename T>
struct KvTile {
  KvPiece<T> pieces[kTilePositions];
  int32_t count = 0;
  int32_t positions = 0;
};

// Of one sequence, from position `start` on, but not to `end`.
template <typename T>
void FillTile(const KvLayer& kv, const int32_t* table, int32_t start, int32_t end, KvTile<T>* tile) {
  const int64_t block_elements = int64_t{kv.heads} * kv.block_tokens * kv.head_dim;
  end = std::min(end, start + static_cast<int32_t>(kTilePositions));
  tile->count = 0;
  tile->positions = std::max(end - start, 0);
  for (int32_t position = start; position < end;) {
    const int32_t offset = position % kv.block_tokens;
    const int64_t at = table[position / kv.block_tokens] * block_elements;
    const int32_t positions = std::min(end - position, kv.block_tokens - offset);
    tile->pieces[tile->count++] = {static_cast<const T*>(kv.keys) + at + offset,
                                   static_cast<const T*>(kv.values) + at + int64_t{offset} * kv.head_dim,
                                   position - start, positions};
    position += positions;
  }
}

// scores[i] of `n` positions of a block, side by side: even and odd features apart, then together.
template <int kVectors, typename T>
HWY_INLINE void ScoreVectors(const float* q, int64_t head_dim, const T* keys, int64_t stride, int64_t n, float scale,
                             float* scores) {
  V sum[2][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sum[0][v] = sum[1][v] = hn::Zero(F32());
  const auto step = [&](int64_t d, V* to) HWY_ATTR {
    const T* k = keys + d * stride;
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

// Of n positions of one head; `scores` has room for a vector more.
template <typename T>
HWY_INLINE void Scores(const KvLayer& kv, const float* q, const T* keys, int64_t n, float scale, float* scores) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    ScoreVectors<2>(q, kv.head_dim, keys + i, kv.block_tokens, 2 * kLanes, scale, scores + i);
  }
  for (; i < n; i += kLanes) ScoreVectors<1>(q, kv.head_dim, keys + i, kv.block_tokens, n - i, scale, scores + i);
}

// context += sum over n positions of weights[i] * values[i], kVectors vectors from `column` on.
template <int kVectors, typename T>
HWY_INLINE void AddVectors(const float* weights, const T* values, int64_t n, int64_t head_dim, int64_t column,
                           float* context) {
  V sum[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sum[v] = hn::LoadU(F32(), context + column + v * kLanes);
  for (int64_t i = 0; i < n; ++i) {
    const V weight = hn::Set(F32(), weights[i]);
    const T* from = values + i * head_dim + column;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v] = hn::MulAdd(weight, Widen(from + v * kLanes), sum[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[v], F32(), context + column + v * kLanes);
}

// The last `columns` < kLanes.
template <typename T>
HWY_INLINE void AddLastColumns(const float* weights, const T* values, int64_t n, int64_t head_dim, int64_t column,
                               float* context) {
  const int64_t columns = head_dim - column;
  V sum = WidenPart(context + column, columns);
  for (int64_t i = 0; i < n; ++i) {
    sum = hn::MulAdd(hn::Set(F32(), weights[i]), WidenPart(values + i * head_dim + column, columns), sum);
  }
  StorePart(sum, context + column, columns);
}

template <typename T>
HWY_INLINE void AddValues(const float* weights, const T* values, int64_t n, int64_t head_dim, float* context) {
  int64_t c = 0;
  for (; c + 8 * kLanes <= head_dim; c += 8 * kLanes) AddVectors<8>(weights, values, n, head_dim, c, context);
  for (; c + 4 * kLanes <= head_dim; c += 4 * kLanes) AddVectors<4>(weights, values, n, head_dim, c, context);
  for (; c + kLanes <= head_dim; c += kLanes) AddVectors<1>(weights, values, n, head_dim, c, context);
  if (c < head_dim) AddLastColumns(weights, values, n, head_dim, c, context);
}

// Some heads of some rows of one sequence, tile by tile: all heads' scores, then all heads' values. So memory is read
// block after block, in which the heads lie side by side.
template <typename T>
class AttentionRun {
 public:
  static constexpr int64_t kStates = 32;  // heads by rows, at most

  AttentionRun(const AttentionJob& job, int64_t first, int64_t last, const int32_t* heads, int64_t count)
      : job_(job), first_(first), rows_(last - first), heads_(heads), count_(count) {}

  void Run() {
    const int64_t head_dim = job_.kv.head_dim;
    const int32_t* table = job_.rows.block_table.row<int32_t>(job_.rows.sequences.row<int32_t>(0)[first_]);
    const int32_t end = *std::max_element(positions() + first_, positions() + first_ + rows_) + 1;
    ForStates([&](int64_t h, int64_t r, int64_t) { std::fill_n(Context(h, r), head_dim, 0.0f); });
    FillTile(job_.kv, table, 0, end, &tiles_[0]);
    for (int32_t start = 0; start < end; start += kTilePositions) {
      const KvTile<T>& tile = tiles_[start / kTilePositions % 2];
      KvTile<T>& next = tiles_[1 - start / kTilePositions % 2];
      FillTile(job_.kv, table, start + kTilePositions, end, &next);
      AllScores(tile, start);
      ForStates([&](int64_t h, int64_t r, int64_t state) {
        const int64_t n = Seen(r, start, 0, tile.positions);
        if (n == 0) return;
        const float rescale = Accumulate(scores_[state], n, softmax_[state]);
        float* context = Context(h, r);
        for (int64_t d = 0; d < head_dim; ++d) context[d] *= rescale;
      });
      AllValues(tile, start, next);
    }
    ForStates([&](int64_t h, int64_t r, int64_t state) {
      float* context = Context(h, r);
      for (int64_t d = 0; d < head_dim; ++d) context[d] /= softmax_[state].sum;
    });
  }

 private:
  const int32_t* positions() const { return job_.rows.positions.row<int32_t>(0); }
  int64_t head_elements() const { return int64_t{job_.kv.head_dim} * job_.kv.block_tokens; }
  float* Context(int64_t h, int64_t r) const {
    return job_.context.row<float>(first_ + r) + heads_[h] * job_.kv.head_dim;
  }

  // How many of `positions` from `place` of the tile at `start` on the row sees.
  int64_t Seen(int64_t r, int32_t start, int32_t place, int32_t positions) const {
    return std::clamp(this->positions()[first_ + r] + 1 - start - place, 0, positions);
  }

  template <typename Function>
  HWY_INLINE void ForStates(const Function& function) {
    for (int64_t h = 0; h < count_; ++h) {
      for (int64_t r = 0; r < rows_; ++r) function(h, r, h * rows_ + r);
    }
  }

  // Fetches what comes `kUnitsAhead` heads after head h of a piece: `piece`, then `next`, both from head 0 on.
  HWY_INLINE void FetchAhead(const T* piece, const T* next, int64_t h) const {
    constexpr int64_t kUnitsAhead = 2, kLine = kLineBytes / static_cast<int64_t>(sizeof(T));
    const bool same = h + kUnitsAhead < count_;
    if (!same && next == nullptr) return;
    const T* from = same ? piece + heads_[h + kUnitsAhead] * head_elements()
                         : next + heads_[std::min(h + kUnitsAhead - count_, count_ - 1)] * head_elements();
    for (int64_t i = 0; i < head_elements(); i += kLine) Prefetch</*kNear=*/true>(from + i);
  }

  void AllScores(const KvTile<T>& tile, int32_t start) {
    for (int32_t p = 0; p < tile.count; ++p) {
      const KvPiece<T>& piece = tile.pieces[p];
      const T* next = p + 1 < tile.count ? tile.pieces[p + 1].keys : tile.pieces[0].values;
      for (int64_t h = 0; h < count_; ++h) {
        FetchAhead(piece.keys, next, h);
        for (int64_t r = 0; r < rows_; ++r) {
          const float* q = job_.qkv.row<float>(first_ + r) + heads_[h] * job_.kv.head_dim;
          Scores(job_.kv, q, piece.keys + heads_[h] * head_elements(), Seen(r, start, piece.place, piece.positions),
                 job_.scale, scores_[h * rows_ + r] + piece.place);
        }
      }
    }
  }

  void AllValues(const KvTile<T>& tile, int32_t start, const KvTile<T>& after) {
    for (int32_t p = 0; p < tile.count; ++p) {
      const KvPiece<T>& piece = tile.pieces[p];
      const T* next = p + 1 < tile.count ? tile.pieces[p + 1].values : after.count > 0 ? after.pieces[0].keys : nullptr;
      for (int64_t h = 0; h < count_; ++h) {
        FetchAhead(piece.values, next, h);
        for (int64_t r = 0; r < rows_; ++r) {
          AddValues(scores_[h * rows_ + r] + piece.place, piece.values + heads_[h] * head_elements(),
                    Seen(r, start, piece.place, piece.positions), job_.kv.head_dim, Context(h, r));
        }
      }
    }
  }

  const AttentionJob& job_;
  const int64_t first_, rows_;
  const int32_t* const heads_;
  const int64_t count_;
  KvTile<T> tiles_[2];
  Softmax softmax_[kStates];  // [count, rows]
  alignas(64) float scores_[kStates][kTilePositions + 2 * kLanes];
};

template <typename T>
void AttendOf(const AttentionJob& job, int64_t first, int64_t last, const int32_t* heads, int64_t count) {
  const int64_t together = AttentionRun<T>::kStates / (last - first);
  for (int64_t h = 0; h < count; h += together) {
    AttentionRun<T>(job, first, last, heads + h, std::min(together, count - h)).Run();
  }
}

void Attend(const AttentionJob& job, int64_t first, int64_t last, const int32_t* heads, int64_t count) {
  if (job.kv.dtype == DType::kFloat16) return AttendOf<hwy::float16_t>(job, first, last, heads, count);
  AttendOf<float>(job, first, last, heads, count);
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

void Attend(const AttentionJob& job, int64_t first, int64_t last, const int32_t* heads, int64_t count) {
  HWY_DYNAMIC_DISPATCH(Attend)(job, first, last, heads, count);
}

}  // namespace dejavu::cpu
#endif
