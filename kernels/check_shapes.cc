#include "kernels/check_shapes.h"

namespace dejavu {
namespace {

// int8 has a factor for each row; the other types have none.
void CheckScale(const char* what, const Tensor& weight, const Tensor& scale) {
  CHECK((weight.dtype == DType::kInt8) == !scale.empty()) << what << " of " << Name(weight.dtype);
  if (!scale.empty()) CheckShape(what, scale, DType::kFloat32, 1, weight.rows);
}

void CheckRows(const RowTable& rows) {
  CheckShape("positions", rows.positions, DType::kInt32, 1, rows.rows());
  CheckShape("sequences", rows.sequences, DType::kInt32, 1, rows.rows());
}

}  // namespace

void CheckShape(const char* what, const Tensor& t, DType dtype, int64_t rows, int64_t cols) {
  CHECK(t.dtype == dtype && t.rows == rows && t.cols == cols)
      << what << " is " << Name(t.dtype) << " [" << t.rows << ", " << t.cols << "], not " << Name(dtype) << " [" << rows
      << ", " << cols << "]";
}

void CheckMasks(const Selection& selection, int64_t rows, int64_t all) {
  if (selection.masks.empty()) return;
  CHECK(!selection.all()) << "masks without a list";
  CHECK(selection.masks.dtype == DType::kInt32 && selection.masks.rows >= rows && selection.masks.cols * 32 >= all)
      << "masks [" << selection.masks.rows << ", " << selection.masks.cols << "] for " << rows << " rows of " << all;
  CHECK(selection.strict.empty() || selection.strict.cols >= rows) << selection.strict.cols << " flags for " << rows;
}

void CheckEmbed(const Tensor& y, const Tensor& ids, const EmbeddingWeights& table, const Tensor& drawn) {
  CheckShape("ids of Embed", ids, DType::kInt32, 1, y.rows);
  CheckShape("y of Embed", y, DType::kFloat32, ids.cols, table.weight.cols);
  CheckScale("scale of Embed", table.weight, table.scale);
  if (!drawn.empty()) CheckShape("drawn of Embed", drawn, DType::kInt32, 1, drawn.cols);
}

void CheckLayerNorm(const Tensor& y, const Tensor& x, const NormWeights& norm) {
  CheckShape("y of LayerNorm", y, DType::kFloat32, x.rows, x.cols);
  CheckShape("x of LayerNorm", x, DType::kFloat32, y.rows, y.cols);
  CheckShape("weight of LayerNorm", norm.weight, DType::kFloat32, 1, x.cols);
  CheckShape("bias of LayerNorm", norm.bias, DType::kFloat32, 1, x.cols);
}

void CheckLinear(const Tensor& y, const Tensor& x, const LinearWeights& w) {
  CheckShape("x of Linear", x, DType::kFloat32, y.rows, w.inputs());
  CheckShape("y of Linear", y, DType::kFloat32, x.rows, w.outputs());
  if (!w.bias.empty()) CheckShape("bias of Linear", w.bias, DType::kFloat32, 1, w.outputs());
  CheckScale("scale of Linear", w.weight, w.scale);
}

void CheckLinear(const Tensor& y, const Tensor& x, const LinearWeights& w, int64_t group, const Ride& ride) {
  CheckLinear(y, x, w);
  CHECK(group > 0 && w.weight.rows % group == 0) << w.weight.rows << " rows in groups of " << group;
  if (ride.w == nullptr) return;
  CHECK(w.layout == LinearWeights::Layout::kOutputRows) << "nothing rides along where an input is a row";
  CHECK(ride.w->layout == LinearWeights::Layout::kOutputRows);
  CheckLinear(ride.y, x, *ride.w);
}

void CheckWriteKv(const KvLayer& kv, const Tensor& qkv, const RowTable& rows) {
  CheckRows(rows);
  CheckShape("qkv", qkv, DType::kFloat32, rows.rows(), 3 * int64_t{kv.heads} * kv.head_dim);
  if (!rows.saturated.empty()) CheckShape("saturated of WriteKv", rows.saturated, DType::kInt32, 1, rows.rows());
  CHECK(kv.dtype == DType::kFloat32 || kv.dtype == DType::kFloat16) << "keys and values of type " << Name(kv.dtype);
}

void CheckAttention(const Tensor& context, const Tensor& qkv, const KvLayer& kv, const RowTable& rows,
                    const Selection& heads) {
  CheckWriteKv(kv, qkv, rows);
  CheckShape("context", context, DType::kFloat32, rows.rows(), int64_t{kv.heads} * kv.head_dim);
  CHECK(int64_t{kv.blocks} * kv.heads * kv.block_tokens <= INT32_MAX) << kv.blocks << " blocks of " << kv.block_tokens;
  CheckMasks(heads, rows.rows(), kv.heads);
}

void CheckSelect(const Selection& selection, const Tensor& counts, const Tensor& a, const SelectorWeights& w,
                 const Tensor& points) {
  const int64_t rows = a.rows, padded = w.b.cols;
  CHECK(padded % kSelectorPadding == 0 && w.outputs <= padded && w.outputs > padded - kSelectorPadding)
      << w.outputs << " outputs in " << padded << " columns";
  CHECK(a.dtype == DType::kFloat32 && a.cols <= w.b.rows) << a.cols << " coordinates, rank " << w.b.rows;
  CheckShape("b of Select", w.b, DType::kInt8, w.b.rows, padded);
  CheckShape("thresholds of Select", w.thresholds, DType::kFloat16, w.ranks.cols, padded);
  CheckShape("points of Select", points, DType::kInt32, 1, rows);
  CheckShape("counts of Select", counts, DType::kInt32, 1, rows);
  CHECK(selection.masks.rows >= rows && selection.masks.cols == padded / 32 && selection.indices.cols >= w.outputs);
}

void CheckMlp(const Tensor& y, const Tensor& x, const MlpWeights& w, const Selection& neurons, const Tensor& hidden,
              const Tensor& active) {
  CHECK(w.up.layout == LinearWeights::Layout::kOutputRows && w.down.layout == LinearWeights::Layout::kInputRows);
  CheckLinear(hidden, x, w.up);
  CheckLinear(y, hidden, w.down);
  CheckMasks(neurons, x.rows, w.up.outputs());
  CHECK(active.empty() || active.cols - 1 <= x.rows) << active.cols - 1 << " rows to count, " << x.rows << " there";
}

void CheckAudit(const Tensor& result, const Tensor& x, const LinearWeights& up, const Tensor& worth,
                const Selection& neurons, const Tensor& hidden) {
  CheckLinear(hidden, x, up);
  CheckShape("result of Audit", result, DType::kFloat32, x.rows, kAuditFields);
  CheckShape("worth of Audit", worth, DType::kFloat32, 1, up.outputs());
  CheckMasks(neurons, x.rows, up.outputs());
  CHECK(neurons.all() || !neurons.masks.empty()) << "an audit wants to know what each row selected";
}

void CheckDraw(const Tensor& tokens, const Tensor& bests, const Tensor& logits, const Tensor& draws,
               Candidates candidates, const DrawDetails& details) {
  CheckShape("tokens of Draw", tokens, DType::kInt32, 1, logits.rows);
  CheckShape("draws of Draw", draws, DType::kInt32, logits.rows, kDrawFields);
  if (!bests.empty()) CheckShape("bests of Draw", bests, DType::kFloat32, logits.rows, kBestFields);
  CHECK(logits.dtype == DType::kFloat32 && candidates.first >= 0 && candidates.end >= 0)
      << "candidates from " << candidates.first << " to " << candidates.end;
  if (details.results.empty()) return;
  CheckShape("results of Draw", details.results, DType::kInt32, logits.rows, kDetailFields);
  CheckShape("adjustments of Draw", details.adjustments, DType::kInt32, details.adjustments.rows, kAdjustFields);
  CheckShape("scratch of Draw", details.scratch, DType::kFloat32, 1, details.adjustments.rows);
  CHECK(candidates.first == 0) << "only rows of all logits have details, not those from " << candidates.first << " on";
}

void CheckAdd(const Tensor& x, const Tensor& y) {
  CheckShape("y of Add", y, DType::kFloat32, x.rows, x.cols);
  CheckShape("x of Add", x, DType::kFloat32, y.rows, y.cols);
}

void CheckGatherRows(const Tensor& y, const Tensor& x, const Tensor& ids) {
  CheckShape("ids of GatherRows", ids, DType::kInt32, 1, y.rows);
  CheckShape("y of GatherRows", y, DType::kFloat32, ids.cols, x.cols);
  CHECK(x.dtype == DType::kFloat32) << Name(x.dtype);
}

}  // namespace dejavu
