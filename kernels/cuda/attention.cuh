// Paged attention of single rows, split over positions (Flash-Decoding): a block takes 256 positions of one head for
// one row, and the last block of a row and head joins the splits in order. What a thread adds depends on positions and
// features alone, not on where blocks of the cache lie or begin, so a row's context is the same bit by bit however it
// was computed.
//
// Keys of a block lie feature after feature: a lane reads one feature of 8 neighbouring positions at once; lanes of
// even and odd numbers have 8 positions each, sixteen features side by side. Values lie position after position: a lane
// reads 8 features of one position.
//
// With `write` a row's keys and values are stored by the same launch. What rows of this step have not stored yet is
// then taken from qkv, rounded as the cache rounds it.
//
// Bytes: keys and values of the positions that a row sees, once for each row.
#ifndef KERNELS_CUDA_ATTENTION_CUH_
#define KERNELS_CUDA_ATTENTION_CUH_

#include "kernels/cuda/common.cuh"

namespace dejavu::cuda {

constexpr int kPieceElements = 8;  // that a lane reads at once

DJ_DEVICE void StoreKv(float* to, float value) { *to = value; }
DJ_DEVICE void StoreKv(Half* to, float value) {
  constexpr float kMost = 65504.0f;
  to->bits = FloatToHalf(value > kMost ? kMost : value < -kMost ? -kMost : value);  // NaN stays
}

template <typename Kv>
DJ_DEVICE float RoundedKv(float value) {
  Kv rounded;
  StoreKv(&rounded, value);
  return WidenElement(&rounded);
}

DJ_DEVICE void LoadPiece(const float* from, float (&to)[kPieceElements]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Vector16 v = LoadVector(from + 4 * half);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[4 * half + i] = __uint_as_float(v.w[i]);
  }
}
DJ_DEVICE void LoadPiece(const Half* from, float (&to)[kPieceElements]) { WidenPiece(LoadVector(from), to, from); }

// A row and a head of the cache.
template <typename Kv>
class CacheOf {
 public:
  DJ_DEVICE CacheOf(const AttentionParams& p, int row, int head)
      : p_(p), table_(Row(p.block_table, p.sequences[row])), row_(row), head_(head), cached_(p.positions[row] + 1) {}

  // Positions of rows of this step, which follow each other, lie in qkv.
  DJ_DEVICE void LeaveOutRowsOfThisStep() {
    const int own = p_.positions[row_];
    int before = 0;
    while (before < row_ && p_.sequences[row_ - before - 1] == p_.sequences[row_] &&
           p_.positions[row_ - before - 1] == own - before - 1) {
      ++before;
    }
    cached_ = own - before;
  }
  DJ_DEVICE int cached() const { return cached_; }

  // Where position `position` has feature 0; keys of other features are block_tokens apart, values one.
  DJ_DEVICE Kv* Key(int position) const { return At(p_.keys, position) + position % p_.block_tokens; }
  DJ_DEVICE Kv* Value(int position) const { return At(p_.values, position) + position % p_.block_tokens * p_.head_dim; }

  DJ_DEVICE float KeyAt(int position, int feature) const {
    return position < cached_ ? WidenElement(Key(position) + feature * p_.block_tokens)
                              : RoundedKv<Kv>(Own(position, 1)[feature]);
  }
  DJ_DEVICE float ValueAt(int position, int feature) const {
    return position < cached_ ? WidenElement(Value(position) + feature) : RoundedKv<Kv>(Own(position, 2)[feature]);
  }

  // Q (0), K (1) or V (2) in qkv of the row of this step that stands at `position`.
  DJ_DEVICE const float* Own(int position, int part) const {
    return Row(p_.qkv, row_ - (p_.positions[row_] - position)) + (part * p_.heads + head_) * p_.head_dim;
  }

  DJ_DEVICE void Store(int position) const {
    for (int d = Thread(); d < p_.head_dim; d += kBlockThreads) {
      StoreKv(Key(position) + d * p_.block_tokens, Own(position, 1)[d]);
      StoreKv(Value(position) + d, Own(position, 2)[d]);
    }
  }

 private:
  DJ_DEVICE Kv* At(void* memory, int position) const {
    const int64_t block = table_[position / p_.block_tokens];
    return static_cast<Kv*>(memory) + (block * p_.heads + head_) * p_.block_tokens * p_.head_dim;
  }

  const AttentionParams& p_;
  const int32_t* const table_;
  const int row_, head_;
  int cached_;  // positions below lie in the cache
};

// What of the selected heads this row and head are.
enum class Part { kNone, kZero, kAttends };
DJ_DEVICE Part PartOf(const SelectionParams& s, int row, int head) {
  if (s.list == nullptr) return Part::kAttends;
  int listed = 0;
  const int count = s.count[0];
  for (int i = Thread(); i < count; i += kBlockThreads) listed |= s.list[i] == head;
  if (!__syncthreads_or(listed)) return Part::kNone;
  return IsStrict(s, row) && !Bit(Row(s.masks, row), head) ? Part::kZero : Part::kAttends;
}

// scores[i] of position first + i, first a multiple of kSplitPositions; beyond `last` -infinity.
template <typename Kv>
DJ_DEVICE void Scores(const AttentionParams& p, const CacheOf<Kv>& cache, const float* q, int first, int last,
                      float* scores) {
  constexpr int kGroup = 2 * kPieceElements, kFeatures = 16;  // positions and features that a warp reads at once
  for (int group = Warp(); group < kSplitPositions / kGroup; group += kWarps) {
    const int position = first + group * kGroup + Lane() % 2 * kPieceElements;
    const int n = Max(0, Min(kPieceElements, last - position));
    float sums[kPieceElements] = {};
    if (p.vectors && n > 0 && Min(position + kPieceElements, last) <= cache.cached()) {
      const Kv* keys = cache.Key(position);
#pragma unroll 4
      for (int d = Lane() / 2; d < p.head_dim; d += kFeatures) {
        float k[kPieceElements];
        LoadPiece(keys + d * p.block_tokens, k);
#pragma unroll
        for (int i = 0; i < kPieceElements; ++i) sums[i] = fmaf(q[d], k[i], sums[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPieceElements; ++i) {
        if (i >= n) continue;
        for (int d = Lane() / 2; d < p.head_dim; d += kFeatures) {
          sums[i] = fmaf(q[d], cache.KeyAt(position + i, d), sums[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPieceElements; ++i) {
      for (int step = 2; step < 32; step *= 2) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], step);
      if (Lane() < 2) scores[position + i - first] = i < n ? sums[i] * p.scale : -INFINITY;
    }
  }
}

DJ_DEVICE float BlockMax(float value, float* shared) {
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  if (Lane() == 0) shared[Warp()] = value;
  __syncthreads();
  float most = shared[0];
  for (int w = 1; w < kWarps; ++w) most = fmaxf(most, shared[w]);
  return most;
}

// context[d] = sum of weights[i] * value(first + i)[d]; `parts` [kBlockThreads * kPieceElements].
template <typename Kv>
DJ_DEVICE void AddValues(const AttentionParams& p, const CacheOf<Kv>& cache, const float* weights, int first, int last,
                         float* parts, float* context) {
  const int pieces = DivideUp(p.head_dim, kPieceElements), groups = kBlockThreads / pieces;
  const int group = Thread() / pieces, feature = Thread() % pieces * kPieceElements;
  const int n = Min(kPieceElements, p.head_dim - feature);
  float sums[kPieceElements] = {};
  if (group < groups) {
#pragma unroll 4
    for (int position = first + group; position < last; position += groups) {
      const float weight = weights[position - first];
      float v[kPieceElements];
      if (p.vectors && position < cache.cached()) {
        LoadPiece(cache.Value(position) + feature, v);
      } else {
#pragma unroll
        for (int i = 0; i < kPieceElements; ++i) v[i] = i < n ? cache.ValueAt(position, feature + i) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kPieceElements; ++i) sums[i] = fmaf(weight, v[i], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPieceElements; ++i) parts[i * kBlockThreads + Thread()] = sums[i];
  __syncthreads();
  for (int d = Thread(); d < p.head_dim; d += kBlockThreads) {
    float sum = 0.0f;
    const float* part = parts + d % kPieceElements * kBlockThreads + d / kPieceElements;
    for (int g = 0; g < groups; ++g) sum += part[g * pieces];
    context[d] = sum;
  }
}

// Joins the splits of a row and head: [splits, head_dim + 2], each its context, maximum and sum.
DJ_DEVICE void JoinSplits(const float* partial, int splits, int head_dim, float* context) {
  const int stride = head_dim + 2;
  float most = -INFINITY;
  for (int s = 0; s < splits; ++s) most = fmaxf(most, partial[s * stride + head_dim]);
  float total = 0.0f;
  for (int s = 0; s < splits; ++s) {
    total += partial[s * stride + head_dim + 1] * expf(partial[s * stride + head_dim] - most);
  }
  for (int d = Thread(); d < head_dim; d += kBlockThreads) {
    float sum = 0.0f;
    for (int s = 0; s < splits; ++s) sum += partial[s * stride + d] * expf(partial[s * stride + head_dim] - most);
    context[d] = sum / total;
  }
}

template <typename Kv>
DJ_DEVICE void Attention(const AttentionParams& p) {
  DJ_SHARED(float, q, kMostHeadDim);
  DJ_SHARED(float, scores, kSplitPositions);
  DJ_SHARED(float, parts, kBlockThreads* kPieceElements);
  DJ_SHARED(float, sums, kWarps);
  DJ_SHARED(float, maxima, kWarps);
  GridLaunchDependents();
  GridWait();
  const int row = static_cast<int>(blockIdx.z), head = static_cast<int>(blockIdx.y);
  const int split = static_cast<int>(blockIdx.x), own = p.positions[row], splits = own / kSplitPositions + 1;
  if (split >= splits) return;
  CacheOf<Kv> cache(p, row, head);
  if (p.write) {
    cache.LeaveOutRowsOfThisStep();
    if (split == 0) cache.Store(own);
  }
  float* context = Row(p.context, row) + head * p.head_dim;
  const Part part = PartOf(p.selected, row, head);
  if (part != Part::kAttends) {
    for (int d = Thread(); part == Part::kZero && split == 0 && d < p.head_dim; d += kBlockThreads) context[d] = 0.0f;
    return;
  }
  for (int d = Thread(); d < p.head_dim; d += kBlockThreads) q[d] = cache.Own(own, 0)[d];
  __syncthreads();

  const int first = split * kSplitPositions, last = Min(first + kSplitPositions, own + 1);
  Scores(p, cache, q, first, last, scores);
  __syncthreads();
  const float most = BlockMax(scores[Thread()], maxima);
  const float weight = first + Thread() < last ? expf(scores[Thread()] - most) : 0.0f;
  scores[Thread()] = weight;
  const float sum = BlockSum(weight, sums);
  const int stride = p.head_dim + 2;
  const int64_t place = (int64_t{row} * p.heads + head) * gridDim.x;
  float* partial = p.partial + (place + split) * stride;
  AddValues(p, cache, scores, first, last, parts, partial);
  if (Thread() == 0) {
    partial[p.head_dim] = most;
    partial[p.head_dim + 1] = sum;
  }
  if (IsLastBlock(p.tickets + row * p.heads + head, static_cast<uint32_t>(splits))) {
    JoinSplits(p.partial + place * stride, splits, p.head_dim, context);
  }
}
static_assert(kSplitPositions == kBlockThreads, "a thread a score");

template <typename Kv>
DJ_DEVICE void WriteKv(const AttentionParams& p) {
  GridLaunchDependents();
  GridWait();
  const int row = static_cast<int>(blockIdx.z), head = static_cast<int>(blockIdx.y);
  CacheOf<Kv>(p, row, head).Store(p.positions[row]);
}

DJ_KERNEL(AttentionF16, AttentionParams, kBlockThreads) { Attention<Half>(p); }
DJ_KERNEL(AttentionF32, AttentionParams, kBlockThreads) { Attention<float>(p); }
DJ_KERNEL(WriteKvF16, AttentionParams, kBlockThreads) { WriteKv<Half>(p); }
DJ_KERNEL(WriteKvF32, AttentionParams, kBlockThreads) { WriteKv<float>(p); }

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_ATTENTION_CUH_
