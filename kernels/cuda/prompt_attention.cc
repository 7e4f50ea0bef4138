#include "kernels/cuda/prompt_attention.h"

#include <algorithm>
#include <cstdint>

#include "kernels/base/round.h"
#include "kernels/cuda/params.h"

namespace dejavu::cuda {
namespace {

constexpr int64_t kLeastHeadDim = 32, kHeadDimStep = 16;
constexpr int64_t kShortPieces = 16;  // at once, beside those of 64 rows; more of them come in turn

}  // namespace

bool TakesPromptAttention(const KvRows& rows) {
  const KvLayer& kv = rows.kv;
  return rows.rows.rows() > kDecodeRows && kv.dtype == DType::kFloat16 && kv.head_dim >= kLeastHeadDim &&
         kv.head_dim % kHeadDimStep == 0 && AttentionFrom(rows, 0).vectors && HasVectors(rows.qkv);
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
  constexpr int64_t kPiece = 8;  // of 16 bytes
  p.shared_stride = Int((head_dim / kPiece | 1) * kPiece);
  const int64_t shared = 2 * (kPieceRows * p.shared_stride + head_dim * kKeyStride + kTilePositions * p.shared_stride) *
                         int64_t{sizeof(uint16_t)};
  const Kernel kernel = head_dim <= 64    ? kPromptAttention64
                        : head_dim <= 128 ? kPromptAttention128
                                          : kPromptAttention256;
  queue.Launch(kernel, {rows.kv.heads, std::min(n, DivideUp(n, kPieceRows) + kShortPieces)}, shared, p);
}

}  // namespace dejavu::cuda
