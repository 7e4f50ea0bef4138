#include "kernels/cuda/held_ops.h"

#include <cstdint>
#include <utility>

#include "kernels/base/round.h"

namespace dejavu::cuda {

int64_t HeldOps::SharedBytes(const NormParams& norm) {
  return 3 * RoundUp(norm.features * int64_t{sizeof(float)}, kVectorBytes);
}

void HeldOps::Launch(const NormParams& norm) { queue_.Launch(kNorm, {norm.rows}, SharedBytes(norm), norm); }

void HeldOps::Flush() {
  if (const auto add = std::exchange(add_, std::nullopt)) {
    const AddParams p = {
        .x = MatrixFrom<float>(add->x), .y = MatrixFrom<const float>(add->y), .features = Int(add->x.cols)};
    queue_.Launch(kAdd, RowGrid(add->x), 0, p);
  }
  if (const auto norm = std::exchange(norm_, std::nullopt)) {
    Launch(norm->params);
  }
  if (const auto rows = std::exchange(write_kv_, std::nullopt)) {
    queue_.Launch(rows->kv.dtype == DType::kFloat16 ? kWriteKvF16 : kWriteKvF32, {1, rows->kv.heads, rows->rows.rows()},
                  0, AttentionFrom(*rows, 0));
  }
}

void HeldOps::HoldAdd(Tensor x, Tensor y) {
  Flush();
  add_ = {x, y};
}

void HeldOps::HoldNorm(Tensor y, Tensor x, const NormWeights& norm) {
  MatrixOf<float> add = {};
  Tensor added;
  if (add_.has_value() && SameView(add_->x, x)) {
    added = add_->y;
    add = MatrixFrom<float>(added);
    add_.reset();
  }
  Flush();
  norm_ = {.params = {.y = MatrixFrom<float>(y),
                      .x = MatrixFrom<float>(x),
                      .add = add,
                      .sums = {},
                      .weight = VectorFrom<float>(norm.weight),
                      .bias = VectorFrom<float>(norm.bias),
                      .fragments = {},
                      .rows = Int(x.rows),
                      .features = Int(x.cols),
                      .vectors = HasVectors(x) && HasVectors(norm.weight) && HasVectors(norm.bias) &&
                                 (add.data == nullptr || HasVectors(added)),
                      .epsilon = norm.epsilon},
           .y = y,
           .x = x};
}

void HeldOps::HoldWriteKv(const KvRows& rows) {
  Flush();
  write_kv_ = rows;
}

std::optional<HeldOps::HeldNorm> HeldOps::TakeNorm(const Tensor& beside) {
  if (norm_.has_value() && (Overlap(norm_->y, beside) || Overlap(norm_->x, beside))) Flush();
  std::optional<HeldNorm> norm = std::exchange(norm_, std::nullopt);
  Flush();
  return norm;
}

std::optional<NormParams> HeldOps::TakeNormOf(const Tensor& x) {
  if (norm_.has_value() && !SameView(norm_->y, x)) Flush();
  const std::optional<HeldNorm> norm = std::exchange(norm_, std::nullopt);
  Flush();
  return norm.has_value() ? std::optional(norm->params) : std::nullopt;
}

bool HeldOps::TakeWriteKv(const KvRows& rows) {
  const bool held = write_kv_.has_value() && write_kv_->kv.keys == rows.kv.keys &&
                    write_kv_->kv.values == rows.kv.values && SameView(write_kv_->qkv, rows.qkv) &&
                    SameView(write_kv_->rows.positions, rows.rows.positions) &&
                    SameView(write_kv_->rows.sequences, rows.rows.sequences) &&
                    SameView(write_kv_->rows.block_table, rows.rows.block_table);
  if (held) write_kv_.reset();
  return held;
}

}  // namespace dejavu::cuda
