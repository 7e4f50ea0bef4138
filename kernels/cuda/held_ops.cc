#include "kernels/cuda/held_ops.h"

#include <algorithm>
#include <utility>

#include "kernels/base/round.h"
#include "kernels/cuda/prompt_attention.h"

namespace dejavu::cuda {

namespace {

int64_t RowBytes(const NormParams& norm) { return RoundUp(norm.features * int64_t{sizeof(float)}, kVectorBytes); }

}  // namespace

int64_t HeldOps::SharedBytes(const NormParams& norm) { return 3 * RowBytes(norm); }

void HeldOps::Launch(const HeldNorm& norm) {
  NormParams p = norm.params;
  if (norm.sum.has_value() && !norm.sum->launched()) {
    HeldSum sum = *norm.sum;
    sum.params.norm = p;
    sum.shared_bytes = std::max(sum.shared_bytes, RowBytes(p));
    Launch(sum);
    return;
  }
  if (norm.sum.has_value()) p.sums = norm.sum->params.sums;
  queue_.Launch(kNorm, {p.rows}, SharedBytes(p), p);
}

// What is left of it.
void HeldOps::Launch(const HeldSum& sum) {
  if (sum.launched()) {
    queue_.Launch(kJoinSums, {DivideUp(sum.y.cols, kBlockThreads), sum.y.rows}, 0, sum.params);
  } else {
    queue_.Launch(sum.kernel, sum.grid, sum.shared_bytes, sum.params);
  }
}

void HeldOps::Flush() {
  if (const auto sum = std::exchange(sum_, std::nullopt)) Launch(*sum);
  if (const auto add = std::exchange(add_, std::nullopt)) {
    const AddParams p = {
        .x = MatrixFrom<float>(add->x), .y = MatrixFrom<const float>(add->y), .features = Int(add->x.cols)};
    queue_.Launch(kAdd, RowGrid(add->x), 0, p);
  }
  if (const auto norm = std::exchange(norm_, std::nullopt)) Launch(*norm);
  if (const auto rows = std::exchange(write_kv_, std::nullopt)) {
    AttentionParams p = AttentionFrom(*rows, 0);
    p.rows = Int(rows->rows.rows());
    if (TakesPromptAttention(queue_.device(), *rows)) {
      queue_.Launch(kWritePromptKv, {p.heads, DivideUp(p.rows, kWriteRows)}, 0, p);
    } else {
      queue_.Launch(rows->kv.dtype == DType::kFloat16 ? kWriteKvF16 : kWriteKvF32, {1, p.heads, p.rows}, 0, p);
    }
    queue_.NoteWritten(p.keys);
  }
}

void HeldOps::HoldSum(HeldSum sum) {
  Flush();
  if (sum.launched()) queue_.Launch(sum.kernel, sum.grid, sum.shared_bytes, sum.params);
  sum_ = std::move(sum);
}

void HeldOps::HoldAdd(Tensor x, Tensor y) {
  if (!sum_.has_value() || add_.has_value() || !SameView(sum_->y, y)) Flush();
  add_ = {x, y};
}

void HeldOps::HoldNorm(Tensor y, Tensor x, const NormWeights& norm) {
  HeldNorm held = {.params = {}, .y = y, .x = x, .sum = {}};
  NormParams& p = held.params;
  p.y = MatrixFrom<float>(y);
  p.x = MatrixFrom<float>(x);
  p.weight = VectorFrom<float>(norm.weight);
  p.bias = VectorFrom<float>(norm.bias);
  p.rows = Int(x.rows);
  p.features = Int(x.cols);
  p.vectors = HasVectors(x) && HasVectors(norm.weight) && HasVectors(norm.bias);
  p.epsilon = norm.epsilon;
  if (add_.has_value() && SameView(add_->x, x)) {
    p.add = MatrixFrom<float>(add_->y);
    p.vectors = p.vectors && HasVectors(add_->y);
    add_.reset();
    held.sum = std::exchange(sum_, std::nullopt);
  }
  Flush();
  norm_ = std::move(held);
}

void HeldOps::HoldWriteKv(const KvRows& rows) {
  Flush();
  write_kv_ = rows;
}

std::optional<HeldNorm> HeldOps::TakeNorm() {
  std::optional<HeldNorm> norm = std::exchange(norm_, std::nullopt);
  Flush();
  return norm;
}

std::optional<HeldNorm> HeldOps::TakeNorm(const Tensor& beside) {
  if (norm_.has_value() && (Overlap(norm_->y, beside) || Overlap(norm_->x, beside))) Flush();
  std::optional<HeldNorm> norm = TakeNorm();
  if (!norm.has_value() || !norm->sum.has_value()) return norm;
  if (norm->sum->launched()) {
    norm->params.sums = norm->sum->params.sums;
  } else {
    Launch(*norm->sum);
  }
  norm->sum.reset();
  return norm;
}

std::optional<HeldNorm> HeldOps::TakeNormOf(const Tensor& x) {
  if (norm_.has_value() && !SameView(norm_->y, x)) Flush();
  return TakeNorm();
}

bool HeldOps::TakeWriteKv(const KvRows& rows) {
  const bool held = write_kv_.has_value() && write_kv_->kv.keys == rows.kv.keys &&
                    write_kv_->kv.values == rows.kv.values && SameView(write_kv_->qkv, rows.qkv) &&
                    SameView(write_kv_->rows.positions, rows.rows.positions) &&
                    SameView(write_kv_->rows.sequences, rows.rows.sequences) &&
                    SameView(write_kv_->rows.block_table, rows.rows.block_table) &&
                    SameView(write_kv_->rows.saturated, rows.rows.saturated);
  if (held) write_kv_.reset();
  return held;
}

}  // namespace dejavu::cuda
