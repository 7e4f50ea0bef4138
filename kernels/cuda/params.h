// The kernels of the CUDA backend by number, and the one parameter that each takes. Included by nvcc, by the daemon and
// by the emulator. Sizes are in elements unless they say bytes; all pointers are device memory; nullptr: not there.
#ifndef KERNELS_CUDA_PARAMS_H_
#define KERNELS_CUDA_PARAMS_H_

#include <cstdint>

namespace dejavu::cuda {

// X(name, parameter): kernel `name` takes `const parameter&`.
#define DEJAVU_CUDA_KERNELS(X)           \
  X(Embed, EmbedParams)                  \
  X(Norm, NormParams)                    \
  X(NormSelect1, NormSelectParams)       \
  X(NormSelect8, NormSelectParams)       \
  X(Add, AddParams)                      \
  X(GatherRows, GatherRowsParams)        \
  X(Audit, AuditParams)                  \
  X(LinearF32, LinearParams)             \
  X(LinearF16x8, LinearParams)           \
  X(LinearF16x16, LinearParams)          \
  X(LinearBF16x8, LinearParams)          \
  X(LinearBF16x16, LinearParams)         \
  X(LinearI8x8, LinearParams)            \
  X(LinearI8x16, LinearParams)           \
  X(SumF32x1, SumParams)                 \
  X(SumF32x4, SumParams)                 \
  X(SumF32x8, SumParams)                 \
  X(SumF16x1, SumParams)                 \
  X(SumF16x4, SumParams)                 \
  X(SumF16x8, SumParams)                 \
  X(SumF16x16, SumParams)                \
  X(SumBF16x1, SumParams)                \
  X(SumBF16x4, SumParams)                \
  X(SumBF16x8, SumParams)                \
  X(SumBF16x16, SumParams)               \
  X(SumI8x1, SumParams)                  \
  X(SumI8x4, SumParams)                  \
  X(SumI8x8, SumParams)                  \
  X(JoinSums, SumParams)                 \
  X(WriteKvF16, AttentionParams)         \
  X(WriteKvF32, AttentionParams)         \
  X(AttentionF16, AttentionParams)       \
  X(AttentionF32, AttentionParams)       \
  X(PromptAttention64, AttentionParams)  \
  X(PromptAttention128, AttentionParams) \
  X(PromptAttention256, AttentionParams) \
  X(WritePromptKv, AttentionParams)      \
  X(ReadSum, ReadSumParams)              \
  X(ReadSumRing, ReadSumParams)          \
  X(Draw, DrawParams)                    \
  X(SplitF16, SplitParams)               \
  X(SplitBF16, SplitParams)              \
  X(FinishGemm, FinishGemmParams)

enum Kernel : int32_t {
#define DEJAVU_CUDA_KERNEL_NUMBER(name, params) k##name,
  DEJAVU_CUDA_KERNELS(DEJAVU_CUDA_KERNEL_NUMBER)
#undef DEJAVU_CUDA_KERNEL_NUMBER
      kKernels
};

constexpr int kBlockThreads = 256;  // of every kernel
constexpr int kWarps = kBlockThreads / 32;

enum WeightType : int32_t { kF32, kF16, kBF16, kI8 };

template <typename T>
struct MatrixOf {
  T* data;  // [rows, stride]
  int64_t stride;
};

// kernels/selection.h: `list` nullptr: all.
struct SelectionParams {
  const int32_t* list;            // ascending
  const int32_t* count;           // [1]
  MatrixOf<const int32_t> masks;  // [rows, words] or nullptr
  const int32_t* strict;          // [rows]; nullptr: all are strict
};

struct EmbedParams {
  MatrixOf<float> y;     // [rows, features]
  const int32_t* ids;    // [rows]
  const int32_t* drawn;  // [any], where ids below zero lie, or nullptr
  const void* table;     // [entries, stride]
  int64_t entries, stride, offset;
  const float* scale;  // [entries], int8 alone
  int32_t features, accumulate;
  WeightType type;
};

// Rows of x as a product reads them (kernels/cuda/fragments.cuh), for weights of 16 bits or of 8.
struct Fragments {
  void* pieces;  // [groups of kLinearRows rows][windows][high, low][rows of the group][4 lanes] of 16 bytes, or nullptr
  float* scales;  // [rows], with int8
};
struct RowFragments {
  Fragments halves, integers;
  WeightType halves_type;  // kF16 or kBF16
};
constexpr int kLinearRows = 16;  // of a group: rows of x that share a pass over the weight

// A Sum (SumParams) whose segments have not been joined yet.
struct SegmentSums {
  MatrixOf<float> partial;  // [segments * rows, columns]
  const float* bias;        // [columns] or nullptr
  int32_t segments, rows;   // segments 0: there is none
};

// y = norm(x), and with `add` before that x += add; without weights y = x. y is left as float32, as fragments, or both.
// With `sums` these are joined first and left in `add`. A block does a row; dynamic shared memory holds three.
struct NormParams {
  MatrixOf<float> y;    // [rows, features] or nullptr
  MatrixOf<float> x;    // [rows, features]
  MatrixOf<float> add;  // [rows, features] or nullptr
  SegmentSums sums;
  const float *weight, *bias;  // [features] or nullptr
  RowFragments fragments;
  int32_t rows, features;
  int32_t vectors;  // x, add, weight and bias start at 16-byte boundaries in every row
  float epsilon;
};

// SelectorWeights (kernels/backend.h).
struct SelectParams {
  MatrixOf<const float> a;              // [rows, coordinates]
  MatrixOf<const int8_t> b;             // [ranks, padded outputs], rows start at 4-byte boundaries
  MatrixOf<const uint16_t> thresholds;  // float16 [points, padded outputs]
  const int32_t *ranks, *points;        // [points], [rows]
  MatrixOf<int32_t> masks;              // [rows, words]
  int32_t *list, *list_count, *counts;  // [outputs], [1], [rows]
  int32_t rows, outputs, words;         // words: padded outputs / 32
  uint32_t* ticket;                     // [1], zero between launches
};
constexpr int kSelectColumns = 128;  // of a block

// Blocks 0 ... norm.rows - 1 do the norm. It and the selection do not depend on each other.
struct NormSelectParams {
  NormParams norm;
  SelectParams select;
};

struct AddParams {
  MatrixOf<float> x;        // [rows, features]
  MatrixOf<const float> y;  // [rows, features]
  int32_t features;
};

struct GatherRowsParams {
  MatrixOf<float> y;        // [rows, features]
  MatrixOf<const float> x;  // [any, features]
  const int32_t* ids;       // [rows], of rows of x
  int32_t features;
};

struct AuditParams {
  MatrixOf<float> result;         // [rows, kAuditFields]
  MatrixOf<const float> hidden;   // [rows, neurons]
  const float* worth;             // [neurons]
  MatrixOf<const int32_t> masks;  // [rows, words] or nullptr
  int32_t neurons;
};

// A weight where an output is a row, and where its products go.
struct OutputRows {
  const void* weight;  // [outputs, stride]
  int64_t stride;
  const float *bias, *scale;  // [outputs] or nullptr; `scale` for int8 alone
  MatrixOf<float> y;          // [rows, outputs]
  Fragments x;                // [rows, inputs], in the form for this weight
  int32_t outputs;
  int32_t vectors;  // all rows start at 16-byte boundaries
};

// y = w x + b for the selected outputs of `w` and, with `ride`, for all of an int8 weight of its own. Grid (groups of
// kLinearRows rows, blocks): the first ride_blocks do `ride`.
struct LinearParams {
  MatrixOf<const float> x;  // [rows, inputs], for float32 weights alone
  int32_t rows, inputs;
  int32_t relu;
  int32_t ride_blocks;
  int32_t group;  // rows of w that an entry of the list stands for
  OutputRows w, ride;
  SelectionParams selected;  // strict rows get zeros where their mask has none
  int32_t list_early;        // the list is at least two launches old
  int32_t* cleared;          // [cleared_count] zeroed for the launches that follow
  int32_t cleared_count;
};
constexpr int kLinearOutputs = 16;                                   // of a tile
constexpr int kMostLinearOutputs = 512;                              // of a block
constexpr int kLinearSlots = 4;                                      // of a warp's ring, each 4 KB
constexpr int kLinearRingBytes = kWarps * kLinearSlots * (4 << 10);  // dynamic shared memory; but for float32

// y = sum over the selected inputs of x[i] * weight[i]. Grid (groups of rows, slabs of columns, segments of inputs).
// Part w of a segment is warp w's.
struct SumParams {
  MatrixOf<float> y;        // [rows, outputs]
  MatrixOf<const float> x;  // [all_rows, inputs]
  const void* weight;       // [inputs, stride]
  int64_t stride;
  const float* scale;        // [inputs], for int8 alone
  SelectionParams selected;  // the list alone
  SegmentSums sums;          // of this launch's rows; columns of whole slabs
  uint32_t* tickets;         // [slabs + 1], zero between launches, for one group of rows; or nullptr: others join
  int32_t* active;           // or nullptr: += how many inputs are not zero in rows 0 ... counted - 1 and in any row
  int32_t counted;
  int32_t all_rows;  // for `active`
  int32_t inputs, outputs;
  int32_t group;       // inputs that an entry of the list stands for
  int32_t segment;     // inputs, a multiple of kWarps
  int32_t vectors;     // all rows of the weight start at 16-byte boundaries
  int32_t skip_zeros;  // may leave out inputs that are zero in all rows of a group
  int32_t list_early;  // the list is two launches old
  NormParams norm;     // of y as `add`, done by the last slab's block of up to kSumNormRows rows; rows 0: none
};
constexpr int kSumNormRows = 4;      // of a kernel whose last block may do the norm
constexpr int kSumRowBytes = 512;    // of a weight's row, in a slab
constexpr int kSumSlotInputs = 4;    // whose rows arrive together
constexpr int kSumRing = 16;         // inputs whose rows a warp has under way
constexpr int kSumWideRing = 32;     // where one block has a multiprocessor for itself
constexpr int kSumWindow = 64;       // inputs that a warp knows: those under way and the next 32
constexpr int kSumMostPart = 65535;  // inputs of a warp
// Under way in a block, and what it takes of dynamic shared memory: the windows of x beside that, and later the sums of
// the warps in its place.
constexpr int SumRingBytes(bool wide) { return kWarps * (wide ? kSumWideRing : kSumRing) * kSumRowBytes; }
constexpr int SumSharedBytes(bool wide, int rows, int columns) {
  const int filled = SumRingBytes(wide) + kWarps * kSumWindow * (rows + 1) * 4,
            joined = kWarps * rows * (columns + 32) * 4;
  return filled > joined ? filled : joined;
}

// Attention of up to kDecodeRows rows, grid (heads, rows, blocks that share a row's splits); WriteKv uses some of it,
// grid (1, heads, rows). Of large steps PromptAttention, grid (heads, pieces), and WritePromptKv, grid (heads, groups
// of kWriteRows).
struct AttentionParams {
  MatrixOf<const float> qkv;             // [rows, 3 * heads * head_dim]
  MatrixOf<float> context;               // [rows, heads * head_dim]
  void *keys, *values;                   // KvLayer (kernels/backend.h)
  const int32_t *positions, *sequences;  // [rows]
  MatrixOf<const int32_t> block_table;   // [sequences, blocks of a sequence]
  int32_t rows, heads, head_dim, block_tokens;
  int32_t vectors;  // 8 positions of a feature, and 8 features of a position, can be read at once
  // Of up to kDecodeRows rows. `write`: stores keys and values as well. Those of the step's own rows are not read from
  // the cache, where they may not have arrived yet. `early`: what else is in the cache, and the selection, are at least
  // two launches old.
  int32_t write, early;
  float scale;
  SelectionParams selected;
  float* partial;         // [rows, heads, splits, head_dim + 2]
  int32_t splits;         // of the longest context that there can be
  uint32_t* tickets;      // [rows * heads], zero between launches
  int32_t shared_stride;  // of PromptAttention: of rows of Q and of values in shared memory
  int32_t* saturated;     // [rows] += keys and values that were beyond the range of the cache's type, or nullptr
};
constexpr int kDecodeRows = 32;
constexpr int kDecodeWarpPositions = 16;
constexpr int kDecodePositions = kWarps * kDecodeWarpPositions;  // of a split
// Dynamic shared memory of a warp: each slot holds keys or values of its positions, in whole 16 bytes for each, or as
// many of their features as go in.
constexpr int kDecodeSlots = 2;
constexpr int kMostDecodeSlotBytes = 4096;
constexpr int kMostHeadDim = 256;
constexpr int kPieceRows = 64;      // of one sequence, at most, that PromptAttention does together
constexpr int kTilePositions = 64;  // whose keys and values it has in shared memory at a time
constexpr int kKeyStride = 72;      // there: an odd number of 16 bytes, so that 8 rows of a matrix lie in 8 banks
constexpr int kWriteRows = 8;       // of a block of WritePromptKv

struct DrawParams {
  int32_t* tokens;                   // [rows]
  MatrixOf<float> bests;             // [rows, kBestFields], or nullptr
  MatrixOf<float> logits;            // [rows, count]; adjusted for a while
  MatrixOf<const int32_t> draws;     // [rows, kDrawFields]
  const int32_t* adjustments;        // [any, kAdjustFields] or nullptr
  float* scratch;                    // [those], or nullptr
  MatrixOf<int32_t> details;         // [rows, kDetailFields], or nullptr: no row wants more than a draw
  int32_t count, first, candidates;  // logits of a row; the id of the first; so many of them may be chosen
};

// Around products of many rows, which a library does. x = high + low, in the type of the weights. Grid (groups of
// kSplitFeatures, rows).
struct SplitParams {
  MatrixOf<const float> x;       // [rows, features]
  MatrixOf<uint16_t> high, low;  // [rows, features]; every 16 bytes are written whole
  int32_t features;
  int32_t vectors;   // all pieces of x start at 16-byte boundaries
  int32_t* cleared;  // [cleared_count] zeroed for the launches that follow
  int32_t cleared_count;
  int32_t counted;
  int32_t* active;   // as SumParams::active, or nullptr
  uint32_t* in_any;  // [features / 32], zero between launches: a bit for each that is not zero in some row
  uint32_t* ticket;  // [1], zero between launches
};
constexpr int kSplitPiece = 8;  // features of a thread
constexpr int kSplitFeatures = kBlockThreads * kSplitPiece;

// y = high + low + bias, and then ReLU. Grid (groups of kFinishFeatures, rows).
struct FinishGemmParams {
  MatrixOf<float> y;                // [rows, features]
  MatrixOf<const float> high, low;  // [rows, features]
  const float* bias;                // [features] or nullptr
  int32_t features, relu;
  int32_t vectors;  // every 4 features of all of them start at 16-byte boundaries
};
constexpr int kFinishFeatures = kBlockThreads * 4;

// sums[t] += the 64-bit words that thread t of the grid reads: all of data once.
struct ReadSumParams {
  const void* data;
  int64_t vectors;      // of 16 bytes
  uint64_t* sums;       // [threads of the grid]
  int32_t ring_groups;  // ReadSumRing: 6, 8 or 12, each kReadGroupBytes of a block's dynamic shared memory
};
constexpr int kReadGroupBytes = 16 << 10;

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_PARAMS_H_
