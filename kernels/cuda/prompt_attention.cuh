// Paged attention of steps of many rows on tensor cores, over a cache of float16 (FlashAttention-2), and how such a
// step stores its keys and values. Where the cache is float32, or its heads are not made of 16 features, attention.cuh
// does it row by row: slow, and right.
//
// A piece is rows of one sequence that follow each other and lie within the same 64 positions: a prompt's pieces have
// 64 rows, a decoding row is one by itself. A block takes a head of a piece, looks the piece up in the row table, and
// goes through the positions up to that of the last row, 64 at a time, while the next 64 are on their way into shared
// memory. Warp w has rows 16 (w / 2) ... of the piece and half w % 2 of the positions; the halves meet at the end.
// Maximum, sum and context of a row are those of the 64 positions before it, scaled, and then these: an order that
// hangs on positions alone, so that neither the other rows nor how a prompt was cut change a bit of it. Not the bits of
// attention.cuh, though.
//
// Q is scaled and split into two numbers of float16: what it adds to a score is as good as float32, at half as many mma
// again. Weights are float16, within 2^-11, and what they are divided by is the sum of these very numbers.
//
// A value that is not a number reaches the rows of its piece that stand before it, for a weight of zero times that is
// none. They are of the same prompt.
//
// Bytes: keys and values of the positions that a piece sees, once for each head.
#ifndef KERNELS_CUDA_PROMPT_ATTENTION_CUH_
#define KERNELS_CUDA_PROMPT_ATTENTION_CUH_

#include "kernels/cuda/attention.cuh"

namespace dejavu::cuda {

// Whether `row` is not in the piece of the row before it; pieces end at multiples of `positions`.
DJ_DEVICE bool BeginsPiece(const AttentionParams& p, int row, int positions) {
  const int position = p.positions[row];
  return row == 0 || position % positions == 0 || p.sequences[row] != p.sequences[row - 1] ||
         position != p.positions[row - 1] + 1;
}

// The piece number `turn`, counted from the last one: puts its first row at shared[kWarps] and returns how many it has;
// 0: there is no such piece.
DJ_DEVICE int FindPiece(const AttentionParams& p, int turn, int* shared) {
  const int share = DivideUp(p.rows, kBlockThreads);
  const int end = p.rows - Thread() * share, begin = Max(0, end - share);
  int own = 0;
  for (int row = begin; row < end; ++row) own += BeginsPiece(p, row, kPieceRows);
  int through = own;  // pieces of the threads up to this one, at first of its warp
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, through, step);
    if (Lane() >= step) through += before;
  }
  __syncthreads();  // what was found before has been read
  if (Lane() == 31) shared[Warp()] = through;
  if (Thread() == 0) shared[kWarps] = -1;
  __syncthreads();
  for (int w = 0; w < Warp(); ++w) through += shared[w];
  if (turn < through && turn >= through - own) {
    int left = turn - (through - own);
    for (int row = end - 1; row >= begin; --row) {
      if (BeginsPiece(p, row, kPieceRows) && left-- == 0) shared[kWarps] = row;
    }
  }
  __syncthreads();
  const int row = shared[kWarps];
  if (row < 0) return 0;
  uint32_t ends[kPieceRows / 32];
#pragma unroll
  for (int i = 0; i < kPieceRows / 32; ++i) {
    const int next = row + 1 + 32 * i + Lane();
    ends[i] = __ballot_sync(kAllLanes, next >= p.rows || BeginsPiece(p, next, kPieceRows));
  }
  return ends[0] != 0 ? __ffs(ends[0]) : 32 + __ffs(ends[1]);
}
static_assert(kPieceRows == 64, "the row after a piece is found by two votes");

// The cache of a sequence and head, from feature 0 of `position` on; positions up to the next multiple of 8 follow.
DJ_DEVICE Half* PlaceOf(const AttentionParams& p, void* memory, const int32_t* table, int head, int position,
                        int stride) {
  const int64_t block = table[position / p.block_tokens];
  return static_cast<Half*>(memory) + (block * p.heads + head) * p.block_tokens * p.head_dim +
         position % p.block_tokens * stride;
}

DJ_DEVICE uint32_t PackHalves(float low, float high) {
  return FloatToHalf(low) | static_cast<uint32_t>(FloatToHalf(high)) << 16;
}

// One head of a piece, of at most kMostFeatures features.
template <int kMostFeatures>
class PromptBlock {
 public:
  // `shared`: Q, and two stages of keys and values. The first row of the piece lies in `row`, shared memory too.
  DJ_DEVICE PromptBlock(const AttentionParams& p, Half* shared, const int* row)
      : p_(p), row_(row), stride_(p.shared_stride), q_(shared) {}

  DJ_DEVICE void Run(int rows) {
    rows_ = rows;
    position_ = p_.positions[*row_];
    table_ = Row(p_.block_table, p_.sequences[*row_]);
    const bool attends = Thread() < rows_ && Attends(Thread());
    if (__syncthreads_or(attends)) {
      Attend();
    } else {
      for (int r = Warp(); r < rows_; r += kWarps) {
        for (int d = Lane(); d < p_.head_dim; d += 32) Context(r)[d] = 0.0f;
      }
    }
  }

 private:
  static constexpr int kGroups = kMostFeatures / 16;  // of 16 features
  static constexpr int kHalf = kTilePositions / 2;
  static constexpr int kPieces = kHalf / 8;              // of 8 positions, of a warp
  static constexpr int kJoined = 4 + kMostFeatures / 2;  // floats of a lane
  static_assert(kPieceRows / 16 * 2 == kWarps && kTilePositions / 8 == kWarps);

  // Few numbers are kept in registers, which the context needs.
  DJ_DEVICE int head() const { return static_cast<int>(blockIdx.x); }
  DJ_DEVICE Half* ring() const { return q_ + 2 * kPieceRows * stride_; }
  DJ_DEVICE int half() const { return Warp() % 2; }
  DJ_DEVICE int first_row() const { return Warp() / 2 * 16; }  // of the warp, in the piece
  DJ_DEVICE int last_position() const { return position_ + rows_ - 1; }

  DJ_DEVICE bool Attends(int r) const {
    return !IsStrict(p_.selected, *row_ + r) || Bit(Row(p_.selected.masks, *row_ + r), head());
  }
  DJ_DEVICE float* Context(int r) const { return Row(p_.context, *row_ + r) + head() * p_.head_dim; }

  DJ_DEVICE Half* Keys(int stage) const {
    return ring() + stage * (p_.head_dim * kKeyStride + kTilePositions * stride_);
  }
  DJ_DEVICE Half* Values(int stage) const { return Keys(stage) + p_.head_dim * kKeyStride; }

  DJ_DEVICE void Attend() {
    const int tiles = last_position() / kTilePositions + 1;
    Load(0, 0);
    CopyAsyncCommit();
    StoreQ();
#pragma unroll
    for (int n = 0; n < 2 * kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) context_[n][i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum_[i] = 0.0f;
    most_[0] = most_[1] = -INFINITY;
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile + 1 < tiles) Load(tile + 1, (tile + 1) % 2);
      CopyAsyncCommit();
      CopyAsyncWait<1>();
      __syncthreads();
      // Rows of the warp that are there see some of its positions.
      const int first = tile * kTilePositions + half() * kHalf;
      if (first_row() < rows_ && first <= Min(last_position(), position_ + first_row() + 15)) {
        AddPositions(Keys(tile % 2) + half() * kHalf, Values(tile % 2) + half() * kHalf * stride_, first);
      }
      __syncthreads();
    }
    Join();
  }

  // Asks for 64 positions, of which those that no row sees become zero: a weight of zero times what was never stored
  // might not be.
  DJ_DEVICE void Load(int tile, int stage) const {
    const int first = tile * kTilePositions;
    {  // a warp has 16 positions, 8 for each lane, of every other 16 features
      const int offset = Warp() / 2 * 16 + Lane() % 2 * 8;
      const bool copies = first + offset <= last_position();
      const Half* from = PlaceOf(p_, p_.keys, table_, head(), copies ? first + offset : 0, 1);
      Half* const to = Keys(stage) + offset;
#pragma unroll 1
      for (int d = Warp() % 2 * 16 + Lane() / 2; d < p_.head_dim; d += 32) {
        CopyAsync16(to + d * kKeyStride, from + d * p_.block_tokens, copies);
      }
    }
    const int offset = Warp() * 8, pieces = p_.head_dim / 8;
    const int n = Min(8, last_position() + 1 - first - offset);  // positions to copy
    const Half* from = PlaceOf(p_, p_.values, table_, head(), n > 0 ? first + offset : 0, p_.head_dim);
    Half* const to = Values(stage) + offset * stride_;
#pragma unroll 1
    for (int i = Lane(); i < 8 * pieces; i += 32) {
      const int position = i / pieces, piece = i - position * pieces;
      CopyAsync16(to + position * stride_ + 8 * piece, from + 8 * i, position < n);
    }
  }

  // q_ [2][kPieceRows][stride_]: upper and lower halves of Q, scaled; rows that are not there are zero.
  DJ_DEVICE void StoreQ() const {
    const int pieces = p_.head_dim / kPieceElements;
    for (int i = Thread(); i < kPieceRows * pieces; i += kBlockThreads) {
      const int r = i / pieces, feature = (i - r * pieces) * kPieceElements;
      float q[kPieceElements] = {};
      if (r < rows_) LoadPiece(Row(p_.qkv, *row_ + r) + head() * p_.head_dim + feature, q);
      Vector16 high, low;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint16_t upper[2], lower[2];
        Split(q[2 * k] * p_.scale, upper[0], lower[0], Half());
        Split(q[2 * k + 1] * p_.scale, upper[1], lower[1], Half());
        high.w[k] = upper[0] | static_cast<uint32_t>(upper[1]) << 16;
        low.w[k] = lower[0] | static_cast<uint32_t>(lower[1]) << 16;
      }
      Half* const to = q_ + r * stride_ + feature;
      *reinterpret_cast<Vector16*>(to) = high;
      *reinterpret_cast<Vector16*>(to + kPieceRows * stride_) = low;
    }
  }

  // The warp's rows and kHalf positions from `first` on, whose keys and values lie there.
  DJ_DEVICE void AddPositions(const Half* keys, const Half* values, int first) {
    float scores[kPieces][4];
    Scores(keys, scores);
    if (first + kHalf - 1 > position_ + first_row()) Mask(first, scores);
    uint32_t weights[kPieces][2];
    Weigh(scores, weights);
    const Half* from = values + Lane() % 16 * stride_ + Lane() / 16 * 8;
#pragma unroll
    for (int j = 0; j < kPieces / 2; ++j) {
      const uint32_t a[4] = {weights[2 * j][0], weights[2 * j][1], weights[2 * j + 1][0], weights[2 * j + 1][1]};
      constexpr uint32_t kOnes[2] = {0x3C003C00, 0x3C003C00};
      MmaF16(sum_, a, kOnes);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        if (16 * n >= p_.head_dim) continue;
        const Vector16 v = LoadMatricesTransposed(from + 16 * j * stride_ + 16 * n);
        const uint32_t left[2] = {v.w[0], v.w[1]}, right[2] = {v.w[2], v.w[3]};
        MmaF16(context_[2 * n], a, left);
        MmaF16(context_[2 * n + 1], a, right);
      }
    }
  }

  DJ_DEVICE void Scores(const Half* keys, float (&scores)[kPieces][4]) const {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    }
    const Half* q = q_ + (first_row() + Lane() % 16) * stride_ + Lane() / 16 * 8;
    const Half* from = keys + Lane() % 16 * kKeyStride + Lane() / 16 * 8;
#pragma unroll 2
    for (int k = 0; k < p_.head_dim; k += 16) {
      const Vector16 upper = LoadMatrices(q + k), lower = LoadMatrices(q + k + kPieceRows * stride_);
#pragma unroll
      for (int j = 0; j < kPieces / 2; ++j) {
        const Vector16 v = LoadMatricesTransposed(from + k * kKeyStride + 16 * j);
        const uint32_t left[2] = {v.w[0], v.w[1]}, right[2] = {v.w[2], v.w[3]};
        MmaF16(scores[2 * j], upper.w, left);
        MmaF16(scores[2 * j + 1], upper.w, right);
        MmaF16(scores[2 * j], lower.w, left);
        MmaF16(scores[2 * j + 1], lower.w, right);
      }
    }
  }

  DJ_DEVICE void Mask(int first, float (&scores)[kPieces][4]) const {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = first + 8 * n + Lane() % 4 * 2 + i % 2;
        if (position > position_ + first_row() + Lane() / 4 + i / 2 * 8) scores[n][i] = -INFINITY;
      }
    }
  }

  // Of scores, as the left factor of mma; what was added before is scaled to the new maximum.
  DJ_DEVICE void Weigh(const float (&scores)[kPieces][4], uint32_t (&weights)[kPieces][2]) {
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = most_[h];
#pragma unroll
      for (int n = 0; n < kPieces; ++n) most = fmaxf(most, fmaxf(scores[n][2 * h], scores[n][2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float from = Finite(most);
      factor[h] = __expf(most_[h] - from);
      most_[h] = most;
#pragma unroll
      for (int n = 0; n < kPieces; ++n) {
        weights[n][h] = PackHalves(__expf(scores[n][2 * h] - from), __expf(scores[n][2 * h + 1] - from));
      }
    }
    if (!__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum_[i] *= factor[i / 2];
#pragma unroll
    for (int n = 0; n < 2 * kGroups; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) context_[n][i] *= factor[i / 2];
    }
  }

  // A row that has seen nothing yet has no maximum.
  static DJ_DEVICE float Finite(float most) { return most == -INFINITY ? 0.0f : most; }

  // Warps of second halves leave what they have in the ring, lane by lane, for those of the first.
  DJ_DEVICE void Join() {
    float* const place = reinterpret_cast<float*>(ring()) + Warp() / 2 * kJoined * 32 + Lane();
    if (half() == 1) {
      place[0] = most_[0];
      place[32] = most_[1];
      place[64] = sum_[0];
      place[96] = sum_[2];
#pragma unroll
      for (int n = 0; n < 2 * kGroups; ++n) {
        if (8 * n >= p_.head_dim) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) place[32 * (4 + 4 * n + i)] = context_[n][i];
      }
    }
    __syncthreads();
    if (half() == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) Finish(h, place);
    }
    __syncthreads();  // the ring has been read
  }

  // Rows first_row() + 8 h ... of the warp.
  DJ_DEVICE void Finish(int h, const float* other) const {
    const int r = first_row() + 8 * h + Lane() / 4;
    if (r >= rows_) return;
    const bool attends = Attends(r);
    const float from = Finite(fmaxf(most_[h], other[32 * h]));
    const float own = __expf(most_[h] - from), others = __expf(other[32 * h] - from);
    const float inverse = 1.0f / (sum_[2 * h] * own + other[32 * (2 + h)] * others);
    float* const to = Context(r) + Lane() % 4 * 2;
#pragma unroll
    for (int n = 0; n < 2 * kGroups; ++n) {
      if (8 * n >= p_.head_dim) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = context_[n][2 * h + i] * own + other[32 * (4 + 4 * n + 2 * h + i)] * others;
        to[8 * n + i] = attends ? sum * inverse : 0.0f;
      }
    }
  }

  const AttentionParams& p_;
  const int* const row_;
  const int stride_;  // of rows of Q and of values
  Half* const q_;
  int rows_ = 0, position_ = 0;  // of the piece, and where its first row stands
  const int32_t* table_ = nullptr;
  // Fragments: of rows Lane() / 4 and 8 further of the warp's.
  float context_[2 * kGroups][4];
  float sum_[4];
  float most_[2];
};

// Grid (heads, any number of blocks, which take pieces in turn).
template <int kMostFeatures>
DJ_DEVICE void PromptAttention(const AttentionParams& p) {
  DJ_DYNAMIC_SHARED(Half, shared);
  DJ_SHARED(int, found, kWarps + 1);
  int turn = static_cast<int>(blockIdx.y);
  int rows = FindPiece(p, turn, found);  // the row table is as old as the step
  GridWait();
  GridLaunchDependents();
  if (!IsListed(p.selected, static_cast<int>(blockIdx.x))) return;
  PromptBlock<kMostFeatures> block(p, shared, found + kWarps);
  while (rows > 0) {
    block.Run(rows);
    turn += static_cast<int>(gridDim.y);
    rows = FindPiece(p, turn, found);
  }
}

DJ_KERNEL(PromptAttention64, AttentionParams, kBlockThreads) { PromptAttention<64>(p); }
DJ_KERNEL(PromptAttention128, AttentionParams, kBlockThreads) { PromptAttention<128>(p); }
DJ_WIDE_KERNEL(PromptAttention256, AttentionParams, kBlockThreads) { PromptAttention<256>(p); }

// Keys and values of rows kWriteRows * blockIdx.y ... for head blockIdx.x. Rows that follow each other within 8
// positions store a feature of their keys at once.
DJ_KERNEL(WritePromptKv, AttentionParams, kBlockThreads) {
  GridWait();
  GridLaunchDependents();
  const int head = static_cast<int>(blockIdx.x), first = static_cast<int>(blockIdx.y) * kWriteRows;
  const int end = Min(p.rows, first + kWriteRows), width = p.heads * p.head_dim;
  for (int i = Thread(); i < 2 * p.head_dim; i += kBlockThreads) {
    const bool is_key = i < p.head_dim;
    const int d = is_key ? i : i - p.head_dim;
    const int column = (is_key ? width : 2 * width) + head * p.head_dim + d;
    for (int row = first; row < end; ++row) {
      const int position = p.positions[row];
      const int32_t* const table = Row(p.block_table, p.sequences[row]);
      if (!is_key) {
        Half* const to = PlaceOf(p, p.values, table, head, position, p.head_dim) + d;
        CountSaturated(p, row, StoreKv(to, Row(p.qkv, row)[column]));
        continue;
      }
      if (!BeginsPiece(p, row, 8)) continue;
      Half* const to = PlaceOf(p, p.keys, table, head, position, 1) + d * p.block_tokens;
      int n = 1;
      while (n < 8 && row + n < p.rows && !BeginsPiece(p, row + n, 8)) ++n;
      if (n < 8) {
        for (int k = 0; k < n; ++k) CountSaturated(p, row + k, StoreKv(to + k, Row(p.qkv, row + k)[column]));
        continue;
      }
      float keys[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) keys[k] = Row(p.qkv, row + k)[column];
      Vector16 v;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Half pair[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) CountSaturated(p, row + 2 * k + i, StoreKv(pair + i, keys[2 * k + i]));
        v.w[k] = pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
      }
      *reinterpret_cast<Vector16*>(to) = v;
    }
  }
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_PROMPT_ATTENTION_CUH_
