// Paged attention of a step of few rows, split over positions (Flash-Decoding). A warp takes 16 positions of one row
// and head, a block's eight warps a split of 128; a row's splits are dealt to its blocks, and joined in ascending
// order: by the one block that has them all, or by the last of several. What is added to a row, and in which order,
// depends on its positions and its head_dim alone, neither on the other rows nor on where blocks of the cache lie nor
// on the grid.
//
// Old keys and values are asked for before GridWait and land in shared memory. Rows of this step, which the launch
// before has made and this one stores, come from qkv, rounded as the cache rounds them, and are put in the same places:
// one arithmetic, however a prompt was cut. A lane reads only what it asked for or put there itself, so that the lanes
// of a warp do not meet over it: of keys, which lie feature after feature, 16 bytes of positions of one feature; of
// values, which lie position after position, 16 bytes of features of one position.
//
// Bytes: keys and values of the positions that a row sees, once for each row. Of them kDecodeBytesInFlight a block are
// under way before GridWait and all along where heads have 128 or more float16 features: 128 KB of a multiprocessor
// with two blocks, 192 KB with three, which fit.
#ifndef KERNELS_CUDA_DECODE_ATTENTION_CUH_
#define KERNELS_CUDA_DECODE_ATTENTION_CUH_

#include "kernels/cuda/attention.cuh"

namespace dejavu::cuda {

constexpr int kDecodeBytesInFlight = kWarps * kDecodeSlots * kMostDecodeSlotBytes;
static_assert(kDecodeBytesInFlight == 64 << 10);
static_assert(kMostHeadDim == kBlockThreads, "a thread a feature");

// Runs of positions in ascending order, each its maximum, its sum of weights relative to that, and its context.
struct JoinedRuns {
  float most = -INFINITY, sum = 0.0f, context = 0.0f;

  DJ_DEVICE void Add(float run_most, float run_sum, float run_context) {
    const float now = fmaxf(most, run_most), scale = expf(most - now), run_scale = expf(run_most - now);
    sum = fmaf(sum, scale, run_sum * run_scale);
    context = fmaf(context, scale, run_context * run_scale);
    most = now;
  }
};

// What the threads of a block leave to each other.
struct DecodeShared {
  Vector16 contexts[kWarps][kMostHeadDim / 4];  // of each warp's positions; float32
  float weights[kWarps][kDecodeWarpPositions];
  float maxima[kWarps], sums[kWarps];
  float q[kMostHeadDim];
};

// A row and a head, of whose splits a block has every blocks_-th.
template <typename Kv>
class DecodeBlock {
 public:
  DJ_DEVICE DecodeBlock(const AttentionParams& p, DecodeShared& shared, unsigned char* slots)
      : p_(p),
        shared_(shared),
        row_(static_cast<int>(blockIdx.y)),
        head_(static_cast<int>(blockIdx.x)),
        number_(static_cast<int>(blockIdx.z)),
        cache_(p, row_, head_),
        own_(p.positions[row_]),
        cached_(p.write ? FirstOfThisStep() : own_ + 1),
        splits_(own_ / kDecodePositions + 1),
        blocks_(Min(splits_, static_cast<int>(gridDim.z))),
        chunks_(DivideUp(p.head_dim, kChunk)),
        pieces_(DivideUp(Min(p.head_dim, kChunk), kPiece)),
        groups_(Min(kDecodeWarpPositions, 32 / pieces_)),
        group_(Lane() / pieces_ < groups_ ? Lane() / pieces_ : kDecodeWarpPositions),
        slots_(slots + Warp() * kDecodeSlots * slot_bytes()),
        next_split_(number_) {}

  DJ_DEVICE bool has_splits() const { return number_ < blocks_; }
  DJ_DEVICE bool Attends() const {
    if (!IsStrict(p_.selected, row_)) return true;
    return (static_cast<uint32_t>(LoadOld(Row(p_.selected.masks, row_) + head_ / 32)) >> head_ % 32 & 1) != 0;
  }

  // Asks for the first items.
  DJ_DEVICE void Begin() {
#pragma unroll 1
    for (int i = 0; i < kDecodeSlots; ++i) Ask();
  }

  // The block that has the row's last split stores its keys and values.
  DJ_DEVICE void StoreOwn() const {
    if (p_.write && number_ == (splits_ - 1) % blocks_) cache_.Store(own_);
  }

  DJ_DEVICE void Clear() const {
    if (number_ == 0 && Thread() < p_.head_dim) Context()[Thread()] = 0.0f;
  }

  // This thread's feature.
  DJ_DEVICE float Q() const { return Thread() < p_.head_dim ? cache_.Own(own_, 0)[Thread()] : 0.0f; }

  // After Begin.
  DJ_DEVICE void Attend(float q) {
    shared_.q[Thread()] = q;
    __syncthreads();
    float* partial = p_.partial + (int64_t{row_} * p_.heads + head_) * p_.splits * (p_.head_dim + 2);
    JoinedRuns joined;
#pragma unroll 1
    for (int split = number_; split < splits_; split += blocks_) {
      const int first = split * kDecodePositions + Warp() * kDecodeWarpPositions;
      if (first <= own_) {
        Weigh(first);
        AddValues(first);
      }
      __syncthreads();
      const JoinedRuns run = JoinWarps(Min(kWarps, (own_ - split * kDecodePositions) / kDecodeWarpPositions + 1));
      if (blocks_ == 1) {
        joined.Add(run.most, run.sum, run.context);
      } else {
        Leave(run, partial + split * (p_.head_dim + 2));
      }
      __syncthreads();
    }
    if (blocks_ > 1) {
      if (!IsLastBlock(p_.tickets + row_ * p_.heads + head_, static_cast<uint32_t>(blocks_))) return;
      joined = JoinSplits(partial);
    }
    if (Thread() < p_.head_dim) Context()[Thread()] = joined.context / joined.sum;
  }

 private:
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(Kv));  // elements of 16 bytes
  static constexpr int kRuns = kDecodeWarpPositions / kPiece;       // pieces of a feature's keys
  static constexpr int kKeyFeatures = 32 / kRuns;                   // of which a warp reads keys at once
  // Features in a slot. An item is a chunk of keys or of values; those of a split follow each other.
  static constexpr int kChunk = kMostDecodeSlotBytes / (kDecodeWarpPositions * static_cast<int>(sizeof(Kv)));
  static_assert(kDecodeSlots == 2, "the chunks of keys and of values, an even number, take turns");

  // Of the rows of this step which are of one sequence, follow each other and end with this one.
  DJ_DEVICE int FirstOfThisStep() const {
    static_assert(kDecodeRows <= 32, "a lane for each row before");
    const int before = row_ - 1 - Lane(), position = p_.positions[row_];
    const bool same =
        before >= 0 && p_.sequences[before] == p_.sequences[row_] && p_.positions[before] == position - 1 - Lane();
    return position - (__ffs(static_cast<int>(~__ballot_sync(kAllLanes, same))) - 1);
  }

  DJ_DEVICE float* Context() const { return Row(p_.context, row_) + head_ * p_.head_dim; }
  DJ_DEVICE int Features(int chunk) const { return Min(kChunk, p_.head_dim - chunk * kChunk); }
  DJ_DEVICE int slot_bytes() const { return kDecodeWarpPositions * pieces_ * 16; }
  DJ_DEVICE Kv* Slot(int item) const { return reinterpret_cast<Kv*>(slots_ + item % kDecodeSlots * slot_bytes()); }
  // Where a slot has this lane's piece: of keys of a feature, of values of a position.
  DJ_DEVICE static Kv* KeyPiece(Kv* slot, int feature) { return slot + (feature * kRuns + Lane() % kRuns) * kPiece; }
  DJ_DEVICE Kv* ValuePiece(Kv* slot, int position) const {
    return slot + (position * pieces_ + Lane() % pieces_) * kPiece;
  }
  DJ_DEVICE int ValueFeature(int chunk) const { return chunk * kChunk + Lane() % pieces_ * kPiece; }
  // The position of a lane's first key, of a warp's that begin with `first`.
  DJ_DEVICE static int KeyPosition(int first) { return first + Lane() % kRuns * kPiece; }

  // Asks for the next item of this block's splits, if there is one, as far as it is cached.
  DJ_DEVICE void Ask() {
    const int first = next_split_ * kDecodePositions + Warp() * kDecodeWarpPositions;
    if (next_split_ < splits_ && first < cached_) {
      if (next_item_ < chunks_) {
        AskForKeys(first, next_item_, Slot(next_item_));
      } else {
        AskForValues(first, next_item_ - chunks_, Slot(next_item_));
      }
    }
    CopyAsyncCommit();
    if (++next_item_ < 2 * chunks_) return;
    next_item_ = 0;
    next_split_ += blocks_;
  }

  DJ_DEVICE void AskForKeys(int first, int chunk, Kv* slot) const {
    const int position = KeyPosition(first), n = Min(kPiece, cached_ - position), features = Features(chunk);
    if (n <= 0) return;
    const int64_t skipped = int64_t{chunk} * kChunk * p_.block_tokens;
    if (p_.vectors) {  // a piece lies in one block, and what is not cached of it is put there later or never looked at
      const Kv* keys = cache_.Key(position) + skipped;
#pragma unroll 4
      for (int f = Lane() / kRuns; f < features; f += kKeyFeatures) {
        CopyAsync16(KeyPiece(slot, f), keys + f * p_.block_tokens);
      }
      return;
    }
    for (int i = 0; i < n; ++i) {
      const Kv* keys = cache_.Key(position + i) + skipped;
      for (int f = Lane() / kRuns; f < features; f += kKeyFeatures) KeyPiece(slot, f)[i] = keys[f * p_.block_tokens];
    }
  }

  DJ_DEVICE void AskForValues(int first, int chunk, Kv* slot) const {
    const int feature = ValueFeature(chunk), n = Min(kPiece, p_.head_dim - feature);
    if (n <= 0) return;
    if (p_.vectors) {
      const Kv* const lower = cache_.Value(first) + feature;
      const Kv* upper = lower;
      if (first + kHalf < cached_) upper = cache_.Value(first + kHalf) + feature - kHalf * p_.head_dim;
#pragma unroll 4
      for (int i = group_; i < Min(kDecodeWarpPositions, cached_ - first); i += groups_) {
        CopyAsync16(ValuePiece(slot, i), (i < kHalf ? lower : upper) + i * p_.head_dim);
      }
      return;
    }
    for (int i = group_; i < Min(kDecodeWarpPositions, cached_ - first); i += groups_) {
      const Kv* values = cache_.Value(first + i) + feature;
      for (int j = 0; j < n; ++j) ValuePiece(slot, i)[j] = values[j];
    }
  }

  // The keys and values that the cache may not have yet.
  DJ_DEVICE void PutKeys(int first, int chunk, Kv* slot) const {
    const int position = KeyPosition(first), features = Features(chunk);
    for (int i = Max(0, cached_ - position); i < Min(kPiece, own_ + 1 - position); ++i) {
      const float* keys = cache_.Own(position + i, 1) + chunk * kChunk;
#pragma unroll 4
      for (int f = Lane() / kRuns; f < features; f += kKeyFeatures) StoreKv(KeyPiece(slot, f) + i, keys[f]);
    }
  }
  DJ_DEVICE void PutValues(int first, int chunk, Kv* slot) const {
    const int feature = ValueFeature(chunk), n = Min(kPiece, p_.head_dim - feature);
    for (int i = group_; i < Min(kDecodeWarpPositions, own_ + 1 - first); i += groups_) {
      if (first + i < cached_) continue;
      const float* values = cache_.Own(first + i, 2) + feature;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        if (j < n) StoreKv(ValuePiece(slot, i) + j, values[j]);
      }
    }
  }

  // Weights of the warp's positions, `first` and the next, with their maximum and sum.
  DJ_DEVICE void Weigh(int first) {
    float sums[kPiece] = {};  // of neighbouring positions
#pragma unroll 1
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      Kv* const slot = Slot(chunk);
      const int features = Features(chunk);
      CopyAsyncWait<kDecodeSlots - 1>();
      PutKeys(first, chunk, slot);
#pragma unroll 4
      for (int f = Lane() / kRuns; f < features; f += kKeyFeatures) {
        float keys[kPiece];
        WidenPiece(LoadShared(KeyPiece(slot, f)), keys, slot);
        const float q = shared_.q[chunk * kChunk + f];
#pragma unroll
        for (int i = 0; i < kPiece; ++i) sums[i] = fmaf(q, keys[i], sums[i]);
      }
      Ask();
    }
    // Lanes that differ in bits from kRuns on have other features of the same positions. At each step one of a pair
    // keeps one half of them, the other the other half, until each has one; bit 4 stays.
    int position = Lane() % kRuns * kPiece;
#pragma unroll
    for (int half = kPiece / 2, bit = kRuns; half > 0; half /= 2, bit *= 2) {
      const bool upper = (Lane() & bit) != 0;
      position += upper ? half : 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float sent = __shfl_xor_sync(kAllLanes, upper ? sums[i] : sums[i + half], bit);
        sums[i] = (upper ? sums[i + half] : sums[i]) + sent;
      }
    }
    sums[0] += __shfl_xor_sync(kAllLanes, sums[0], 16);

    const bool sees = first + position <= own_;
    const float score = sees ? sums[0] * p_.scale : -INFINITY;
    float most = score;
    for (int bit = 1; bit < 16; bit *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, bit));
    const float weight = sees ? expf(score - most) : 0.0f;
    float sum = weight;
    for (int bit = 1; bit < 16; bit *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
    if (Lane() < kDecodeWarpPositions) shared_.weights[Warp()][position] = weight;
    if (Lane() == 0) {
      shared_.maxima[Warp()] = most;
      shared_.sums[Warp()] = sum;
    }
    __syncwarp();
  }

  // The warp's context, of what the row sees.
  DJ_DEVICE void AddValues(int first) {
    const int end = Min(kDecodeWarpPositions, own_ + 1 - first);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      Kv* const slot = Slot(chunks_ + chunk);
      CopyAsyncWait<kDecodeSlots - 1>();
      PutValues(first, chunk, slot);
      float sums[kPiece] = {};
#pragma unroll 4
      for (int i = group_; i < end; i += groups_) {
        float values[kPiece];
        WidenPiece(LoadShared(ValuePiece(slot, i)), values, slot);
        const float weight = shared_.weights[Warp()][i];
#pragma unroll
        for (int j = 0; j < kPiece; ++j) sums[j] = fmaf(weight, values[j], sums[j]);
      }
      Ask();
      float all[kPiece];
#pragma unroll
      for (int j = 0; j < kPiece; ++j) all[j] = sums[j];
      for (int g = 1; g < groups_; ++g) {
#pragma unroll
        for (int j = 0; j < kPiece; ++j) all[j] += __shfl_down_sync(kAllLanes, sums[j], g * pieces_);
      }
      if (Lane() >= pieces_ || ValueFeature(chunk) >= p_.head_dim) continue;
#pragma unroll
      for (int j = 0; j < kPiece; j += 4) {
        Vector16 part;
#pragma unroll
        for (int k = 0; k < 4; ++k) part.w[k] = __float_as_uint(all[j + k]);
        shared_.contexts[Warp()][(ValueFeature(chunk) + j) / 4] = part;
      }
    }
  }

  // The first `warps` warps, of the context this thread's feature.
  DJ_DEVICE JoinedRuns JoinWarps(int warps) const {
    JoinedRuns run;
    for (int w = 0; w < warps; ++w) run.most = fmaxf(run.most, shared_.maxima[w]);
    for (int w = 0; w < warps; ++w) {
      const float scale = expf(shared_.maxima[w] - run.most);
      run.sum = fmaf(shared_.sums[w], scale, run.sum);
      run.context = fmaf(reinterpret_cast<const float*>(shared_.contexts[w])[Thread()], scale, run.context);
    }
    return run;
  }

  // A split for the block that joins: [head_dim + 2].
  DJ_DEVICE void Leave(const JoinedRuns& run, float* to) const {
    if (Thread() < p_.head_dim) to[Thread()] = run.context;
    if (Thread() != 0) return;
    to[p_.head_dim] = run.most;
    to[p_.head_dim + 1] = run.sum;
  }
  DJ_DEVICE JoinedRuns JoinSplits(const float* partial) const {
    JoinedRuns joined;
    const int feature = Min(Thread(), p_.head_dim - 1);
#pragma unroll 8
    for (int s = 0; s < splits_; ++s) {
      const float* run = partial + s * (p_.head_dim + 2);
      joined.Add(run[p_.head_dim], run[p_.head_dim + 1], run[feature]);
    }
    return joined;
  }

  static constexpr int kHalf = kDecodeWarpPositions / 2;  // with p_.vectors these lie in one block of the cache

  const AttentionParams& p_;
  DecodeShared& shared_;
  const int row_, head_, number_;
  const CacheOf<Kv> cache_;
  const int own_;     // position of the row
  const int cached_;  // positions below lie in the cache, and have for long
  const int splits_;  // that hold positions which the row sees
  const int blocks_;  // that have some of them
  const int chunks_;
  // Of values a warp reads `pieces_` pieces of each of `groups_` positions at once; lanes beyond them have none.
  const int pieces_, groups_, group_;
  unsigned char* const slots_;
  int next_split_, next_item_ = 0;  // of what is asked for next
};

// Positions, sequences and the block table are copied to the device before the step's first launch, which comes after
// the copies have ended: they may be read before GridWait. So may old keys and values and the selection, with `early`.
template <typename Kv>
DJ_DEVICE void DecodeAttention(const AttentionParams& p) {
  DJ_SHARED(DecodeShared, shared, 1);
  DJ_DYNAMIC_SHARED(unsigned char, slots);
  if (!p.early) GridWait();
  DecodeBlock<Kv> block(p, shared[0], slots);
  const bool listed = block.has_splits() && IsListed(p.selected, static_cast<int>(blockIdx.x));
  const bool attends = listed && block.Attends();
  if (attends) block.Begin();
  GridWait();
  GridLaunchDependents();
  if (!block.has_splits()) return;
  const float q = block.Q();  // is on its way while keys and values are stored
  block.StoreOwn();
  if (attends) {
    block.Attend(q);
  } else if (listed) {
    block.Clear();
  }
}

DJ_SLIM_KERNEL(AttentionF16, AttentionParams, kBlockThreads) { DecodeAttention<Half>(p); }
DJ_SLIM_KERNEL(AttentionF32, AttentionParams, kBlockThreads) { DecodeAttention<float>(p); }

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_DECODE_ATTENTION_CUH_
