// Paged attention, split over positions (Flash-Decoding): a block takes 256 positions of one head, for one row or, of a
// prompt, for up to 8 rows that follow each other, and the last block of a row and head joins the splits in order. What
// a thread adds to a row depends on positions and features alone, neither on where blocks of the cache lie or begin nor
// on the other rows, so a row's context is the same bit by bit however it was computed.
//
// Keys of a block lie feature after feature: a lane reads one feature of 8 neighbouring positions at once; lanes of
// even and odd numbers have 8 positions each, sixteen features side by side. Values lie position after position: a lane
// reads 8 features of one position.
//
// With `write` a row's keys and values are stored by the same launch. What rows of this step have not stored yet is
// then taken from qkv, rounded as the cache rounds it.
//
// Bytes: keys of the positions that a row sees, once for each row or 8 of a prompt; values likewise, but for 4.
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

// Whether this head is one of the selected ones.
DJ_DEVICE bool IsListed(const SelectionParams& s, int head) {
  if (s.list == nullptr) return true;
  int listed = 0;
  const int count = s.count[0];
  for (int i = Thread(); i < count; i += kBlockThreads) listed |= s.list[i] == head;
  return __syncthreads_or(listed);
}

DJ_DEVICE float BlockMax(float value, float* shared) {
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  if (Lane() == 0) shared[Warp()] = value;
  __syncthreads();
  float most = shared[0];
  for (int w = 1; w < kWarps; ++w) most = fmaxf(most, shared[w]);
  return most;
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

// One head of rows of one sequence, at most kRows, that stand at positions which follow each other, and one split of
// the positions that they see.
template <typename Kv, int kRows>
class AttentionBlock {
 public:
  // Shared: `q` [kRows][kMostHeadDim], `scores` [kRows][kSplitPositions], `parts` [kBlockThreads * kPieceElements].
  DJ_DEVICE AttentionBlock(const AttentionParams& p, float* q, float* scores, float* parts, float* sums, float* maxima)
      : p_(p),
        head_(static_cast<int>(blockIdx.y)),
        split_(static_cast<int>(blockIdx.x)),
        first_(split_ * kSplitPositions),
        q_(q),
        scores_(scores),
        parts_(parts),
        sums_(sums),
        maxima_(maxima) {}

  // Rows `row` ... `row` + `rows` of the step.
  DJ_DEVICE void Run(int row, int rows) {
    const int last_position = p_.positions[row + rows - 1];
    if (last_position < first_) return;
    CacheOf<Kv> cache(p_, row + rows - 1, head_);
    if (p_.write) {
      cache.LeaveOutRowsOfThisStep();
      if (split_ == 0) cache.Store(last_position);
    }
    if (!IsListed(p_.selected, head_)) return;
    row_ = row;
    rows_ = rows;
    end_ = last_position + 1;
    bool any = false;
    for (int r = 0; r < rows; ++r) any = any || Attends(r);
    if (any) Attend(cache);
    for (int r = 0; r < rows; ++r) {
      if (split_ > 0 || Attends(r)) continue;
      for (int d = Thread(); d < p_.head_dim; d += kBlockThreads) Context(r)[d] = 0.0f;
    }
  }

 private:
  static constexpr int kValueRows = kRows < 4 ? kRows : 4;  // whose sums a thread has at a time

  DJ_DEVICE bool Attends(int r) const {
    return !IsStrict(p_.selected, row_ + r) || Bit(Row(p_.selected.masks, row_ + r), head_);
  }
  DJ_DEVICE float* Context(int r) const { return Row(p_.context, row_ + r) + head_ * p_.head_dim; }
  // The position after the last one of this split that row r sees.
  DJ_DEVICE int End(int r) const { return Min(first_ + kSplitPositions, end_ - (rows_ - 1 - r)); }

  DJ_DEVICE void Attend(const CacheOf<Kv>& cache) {
    __syncthreads();  // what was in shared memory has been read
    for (int r = 0; r < rows_; ++r) {
      const float* from = Row(p_.qkv, row_ + r) + head_ * p_.head_dim;
      for (int d = Thread(); d < p_.head_dim; d += kBlockThreads) q_[r * kMostHeadDim + d] = from[d];
    }
    __syncthreads();
    Scores(cache);
    __syncthreads();
    const int stride = p_.head_dim + 2;
    const int64_t splits = gridDim.x;
    float* partial = p_.partial + (int64_t{row_} * p_.heads + head_) * splits * stride;  // of row 0
    const int64_t row_stride = p_.heads * splits * stride;
    for (int r = 0; r < rows_; ++r) {
      float& score = scores_[r * kSplitPositions + Thread()];
      const float most = BlockMax(score, maxima_);
      const float weight = first_ + Thread() < End(r) ? expf(score - most) : 0.0f;
      score = weight;
      const float sum = BlockSum(weight, sums_);
      if (Thread() == 0) {
        partial[r * row_stride + split_ * stride + p_.head_dim] = most;
        partial[r * row_stride + split_ * stride + p_.head_dim + 1] = sum;
      }
    }
    AddValues(cache, partial + split_ * stride, row_stride);
    for (int r = 0; r < rows_; ++r) {
      if (End(r) <= first_ || !Attends(r)) continue;
      const int of_row = (end_ - (rows_ - 1 - r) - 1) / kSplitPositions + 1;
      if (IsLastBlock(p_.tickets + (row_ + r) * p_.heads + head_, static_cast<uint32_t>(of_row))) {
        JoinSplits(partial + r * row_stride, of_row, p_.head_dim, Context(r));
      }
    }
  }

  // scores_[r][i] of position first_ + i; -infinity where row r does not see it.
  DJ_DEVICE void Scores(const CacheOf<Kv>& cache) {
    constexpr int kGroup = 2 * kPieceElements, kFeatures = 16;  // positions and features that a warp reads at once
    const int last = End(rows_ - 1);
    for (int group = Warp(); group < kSplitPositions / kGroup; group += kWarps) {
      const int position = first_ + group * kGroup + Lane() % 2 * kPieceElements;
      const int n = Max(0, Min(kPieceElements, last - position));
      float sums[kRows][kPieceElements] = {};
      if (p_.vectors && n > 0 && Min(position + kPieceElements, last) <= cache.cached()) {
        const Kv* keys = cache.Key(position);
#pragma unroll(kRows == 1 ? 4 : 1)
        for (int d = Lane() / 2; d < p_.head_dim; d += kFeatures) {
          float k[kPieceElements];
          LoadPiece(keys + d * p_.block_tokens, k);
          AddProducts(k, d, sums);
        }
      } else {
        for (int d = Lane() / 2; d < p_.head_dim; d += kFeatures) {
          float k[kPieceElements];
#pragma unroll
          for (int i = 0; i < kPieceElements; ++i) k[i] = i < n ? cache.KeyAt(position + i, d) : 0.0f;
          AddProducts(k, d, sums);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kPieceElements; ++i) {
          float sum = sums[r][i];
          for (int step = 2; step < 32; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
          if (Lane() >= 2 || r >= rows_) continue;
          scores_[r * kSplitPositions + position + i - first_] = position + i < End(r) ? sum * p_.scale : -INFINITY;
        }
      }
    }
  }
  DJ_DEVICE void AddProducts(const float (&k)[kPieceElements], int d, float (&sums)[kRows][kPieceElements]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float q = q_[r * kMostHeadDim + d];
#pragma unroll
      for (int i = 0; i < kPieceElements; ++i) sums[r][i] = fmaf(q, k[i], sums[r][i]);
    }
  }

  // to[r * row_stride + d] = sum of scores_[r][i] * value(first_ + i)[d] over what row r sees.
  DJ_DEVICE void AddValues(const CacheOf<Kv>& cache, float* to, int64_t row_stride) {
    const int pieces = DivideUp(p_.head_dim, kPieceElements), groups = kBlockThreads / pieces;
    const int group = Thread() / pieces, feature = Thread() % pieces * kPieceElements;
    const int n = Min(kPieceElements, p_.head_dim - feature);
    for (int first_row = 0; first_row < rows_; first_row += kValueRows) {
      const int last_row = Min(first_row + kValueRows, rows_) - 1;
      float sums[kValueRows][kPieceElements] = {};
      if (group < groups) {
        const int last = End(last_row);
#pragma unroll 4
        for (int position = first_ + group; position < last; position += groups) {
          float v[kPieceElements];
          if (p_.vectors && position < cache.cached()) {
            LoadPiece(cache.Value(position) + feature, v);
          } else {
#pragma unroll
            for (int i = 0; i < kPieceElements; ++i) v[i] = i < n ? cache.ValueAt(position, feature + i) : 0.0f;
          }
#pragma unroll
          for (int j = 0; j < kValueRows; ++j) {
            if (first_row + j > last_row || position >= End(first_row + j)) continue;  // NaN times 0 is not 0
            const float weight = scores_[(first_row + j) * kSplitPositions + position - first_];
#pragma unroll
            for (int i = 0; i < kPieceElements; ++i) sums[j][i] = fmaf(weight, v[i], sums[j][i]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kValueRows; ++j) {
        if (first_row + j > last_row) continue;
        __syncthreads();  // parts_ has been read
#pragma unroll
        for (int i = 0; i < kPieceElements; ++i) parts_[i * kBlockThreads + Thread()] = sums[j][i];
        __syncthreads();
        for (int d = Thread(); d < p_.head_dim; d += kBlockThreads) {
          float sum = 0.0f;
          const float* part = parts_ + d % kPieceElements * kBlockThreads + d / kPieceElements;
          for (int g = 0; g < groups; ++g) sum += part[g * pieces];
          to[(first_row + j) * row_stride + d] = sum;
        }
      }
    }
  }

  const AttentionParams& p_;
  const int head_, split_;
  const int first_;  // position of the split
  int row_ = 0, rows_ = 0;
  int end_ = 0;  // the position after that of the last row
  float* const q_;
  float* const scores_;
  float* const parts_;
  float* const sums_;
  float* const maxima_;
};

// A block has kRows rows of the step, in runs of one sequence.
template <typename Kv, int kRows>
DJ_DEVICE void Attention(const AttentionParams& p) {
  DJ_SHARED(float, q, kRows* kMostHeadDim);
  DJ_SHARED(float, scores, kRows* kSplitPositions);
  DJ_SHARED(float, parts, kBlockThreads* kPieceElements);
  DJ_SHARED(float, sums, kWarps);
  DJ_SHARED(float, maxima, kWarps);
  GridWait();
  GridLaunchDependents();
  AttentionBlock<Kv, kRows> block(p, q, scores, parts, sums, maxima);
  const int end = Min(p.rows, (static_cast<int>(blockIdx.z) + 1) * kRows);
  int next = 0;
  for (int row = static_cast<int>(blockIdx.z) * kRows; row < end; row = next) {
    next = row + 1;
    while (next < end && p.sequences[next] == p.sequences[row] &&
           p.positions[next] == p.positions[row] + (next - row)) {
      ++next;
    }
    block.Run(row, next - row);
  }
}
static_assert(kSplitPositions == kBlockThreads, "a thread a score");

template <typename Kv>
DJ_DEVICE void WriteKv(const AttentionParams& p) {
  GridWait();
  GridLaunchDependents();
  const int row = static_cast<int>(blockIdx.z), head = static_cast<int>(blockIdx.y);
  CacheOf<Kv>(p, row, head).Store(p.positions[row]);
}

DJ_KERNEL(AttentionF16, AttentionParams, kBlockThreads) { Attention<Half, 1>(p); }
DJ_KERNEL(AttentionF32, AttentionParams, kBlockThreads) { Attention<float, 1>(p); }
DJ_KERNEL(WriteKvF16, AttentionParams, kBlockThreads) { WriteKv<Half>(p); }
DJ_KERNEL(WriteKvF32, AttentionParams, kBlockThreads) { WriteKv<float>(p); }

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_ATTENTION_CUH_
