#include "kernels/cuda/prompt_attention.h"

#include <algorithm>
#include <cstdint>

#include "kernels/base/round.h"
#include "kernels/cuda/params.h"

namespace dejavu::cuda {
namespace {

constexpr int64_t kLeastHeadDim = 32, kHeadDimStep = 16;
constexpr int64_t kShortPieces = 16;  // at once, beside those of 64 rows; more of them come in turn

constexpr int64_t kStaticBytes = 1 << 10;  // more than the kernels take

// Of rows of Q and of values in shared memory: an odd number of 16 bytes, so that 8 rows of a matrix lie in 8 banks.
int64_t StrideOf(int64_t head_dim) {
  constexpr int64_t kPiece = kVectorBytes / int64_t{sizeof(uint16_t)};
  return (head_dim / kPiece | 1) * kPiece;
}

// Halves of Q, and two stages of keys and values.
int64_t SharedBytes(int64_t head_dim) {
  const int64_t elements =
      kPieceRows * StrideOf(head_dim) + head_dim * kKeyStride + kTilePositions * StrideOf(head_dim);
  return 2 * elements * int64_t{sizeof(uint16_t)};
}

}  // namespace

bool TakesPromptAttention(const DejavuCudaDevice& device, const KvRows& rows) {
  const KvLayer& kv = rows.kv;
  return rows.rows.rows() > kDecodeRows && kv.dtype == DType::kFloat16 && kv.head_dim >= kLeastHeadDim &&
         kv.head_dim % kHeadDimStep == 0 && AttentionFrom(rows, 0).vectors && HasVectors(rows.qkv) &&
         SharedBytes(kv.head_dim) + kStaticBytes <= device.shared_bytes_per_block;
}

// How many pieces the rows make is in the row table, which the host does not read: a block for every 64 rows, and some
// for rows of sequences that have few.
void LaunchPromptAttention(DeviceQueue& queue, const KvRows& rows, Tensor context, float scale,
                           const Selection& heads) {
  const int64_t n = rows.rows.rows(), head_dim = rows.kv.head_dim;
  AttentionParams p = AttentionFrom(rows, 0);
  p.context = MatrixFrom<float>(context);
  p.rows = Int(n);
  p.scale = scale;
  p.selected = SelectionFrom(heads, /*masks=*/true);
  p.shared_stride = Int(StrideOf(head_dim));
  const Kernel kernel = head_dim <= 64    ? kPromptAttention64
                        : head_dim <= 128 ? kPromptAttention128
                                          : kPromptAttention256;
  queue.Launch(kernel, {rows.kv.heads, std::min(n, DivideUp(n, kPieceRows) + kShortPieces)}, SharedBytes(head_dim), p);
}

}  // namespace dejavu::cuda
