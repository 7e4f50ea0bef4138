#include "engine/opt_model.h"

#include <cmath>
#include <utility>
#include <vector>

#include "kernels/base/status_macros.h"

namespace dejavu {

absl::StatusOr<std::unique_ptr<OptModel>> OptModel::Create(const OptConfig& config, const OptWeights& weights,
                                                           Backend& backend, Communicator& communicator,
                                                           const Batch& largest) {
  std::unique_ptr<OptModel> model(new OptModel(config, weights, backend, communicator));
  RETURN_IF_ERROR(model->Allocate(largest));
  return model;
}

absl::Status OptModel::Allocate(const Batch& largest) {
  struct Wanted {
    Tensor* view;
    int64_t rows, cols;
  };
  const auto take = [this](DType dtype, const std::vector<Wanted>& wanted, Buffer* buffer) -> absl::Status {
    constexpr int64_t kAlignmentBytes = 256;
    std::vector<int64_t> offsets;
    int64_t bytes = 0;
    for (const Wanted& t : wanted) {
      offsets.push_back(bytes);
      bytes += (t.rows * t.cols * SizeOf(dtype) + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
    }
    ASSIGN_OR_RETURN(*buffer, dev_.Allocate(bytes));
    for (size_t i = 0; i < wanted.size(); ++i) {
      *wanted[i].view = buffer->View(offsets[i], dtype, wanted[i].rows, wanted[i].cols);
    }
    return absl::OkStatus();
  };
  const int64_t rows = largest.max_rows, logit_rows = largest.max_logit_rows, hidden = config_.hidden;
  const int64_t embed = config_.embed == config_.hidden ? 0 : config_.embed;
  RETURN_IF_ERROR(take(DType::kFloat32,
                       {{&x_, rows, hidden},
                        {&h_, rows, hidden},
                        {&qkv_, rows, 3 * hidden},
                        {&context_, rows, hidden},
                        {&partial_, rows, hidden},
                        {&neurons_, rows, config_.ffn},
                        {&embedded_, rows, embed},
                        {&last_, logit_rows, hidden},
                        {&projected_, logit_rows, embed},
                        {&logits_, logit_rows, config_.vocab}},
                       &floats_));
  return take(DType::kInt32,
              {{&tokens_, 1, rows},
               {&positions_, 1, rows},
               {&row_slots_, 1, rows},
               {&logit_rows_, 1, logit_rows},
               {&block_table_, largest.slots, largest.blocks_per_slot}},
              &ints_);
}

void OptModel::Forward(const Batch& batch, const KvCache& kv, float* logits) {
  const RowTable rows = UploadRows(batch);
  Embed(batch, rows);
  for (int32_t l = 0; l < config_.layers; ++l) Layer(weights_.layers[l], kv.layer(l), rows);
  if (!batch.logit_rows.empty()) Head(batch, logits);
  dev_.Synchronize();
}

RowTable OptModel::UploadRows(const Batch& batch) {
  const int64_t n = batch.rows();
  CHECK(n > 0 && n <= x_.rows) << n << " rows, capacity " << x_.rows;
  RowTable rows{positions_.Cols(0, n), row_slots_.Cols(0, n), block_table_};
  dev_.Upload(tokens_.Cols(0, n), batch.tokens.data());
  dev_.Upload(rows.positions, batch.positions.data());
  dev_.Upload(rows.sequences, batch.row_slots.data());
  dev_.Upload(rows.block_table, batch.block_table.data());
  return rows;
}

void OptModel::Embed(const Batch& batch, const RowTable& rows) {
  const Tensor x = x_.Rows(0, batch.rows()), tokens = tokens_.Cols(0, batch.rows());
  if (weights_.project_in.weight.empty()) {
    dev_.Embed(x, tokens, weights_.token_embedding, 0, /*accumulate=*/false);
  } else {
    const Tensor embedded = embedded_.Rows(0, batch.rows());
    dev_.Embed(embedded, tokens, weights_.token_embedding, 0, /*accumulate=*/false);
    dev_.Linear(x, embedded, weights_.project_in);
  }
  dev_.Embed(x, rows.positions, weights_.position_embedding, kPositionOffset, /*accumulate=*/true);
}

// Pre-norm: x += attention(norm(x)); x += mlp(norm(x)). Post-norm (OPT-350m): x = norm(x + attention(x)); x = norm(x +
// mlp(x)).
void OptModel::Layer(const LayerWeights& w, const KvLayer& kv, const RowTable& rows) {
  const int64_t n = rows.rows();
  const Tensor x = x_.Rows(0, n), h = config_.pre_norm ? h_.Rows(0, n) : x, qkv = qkv_.Rows(0, n);
  const Tensor context = context_.Rows(0, n), partial = partial_.Rows(0, n);
  const Selection heads, neurons;  // everything
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));

  if (config_.pre_norm) dev_.LayerNorm(h, x, w.attention_norm);
  dev_.Linear(qkv, h, w.qkv);
  dev_.WriteKv(kv, qkv, rows);
  dev_.Attention(context, qkv, kv, rows, scale, heads);
  dev_.Linear(partial, context, w.out, heads, config_.head_dim);
  comm_.AllReduce(partial);
  dev_.Add(x, partial);
  if (!config_.pre_norm) dev_.LayerNorm(x, x, w.attention_norm);

  if (config_.pre_norm) dev_.LayerNorm(h, x, w.mlp_norm);
  dev_.Mlp(partial, h, w.mlp, neurons, /*skip_zeros=*/true, neurons_.Rows(0, n), {});
  comm_.AllReduce(partial);
  dev_.Add(x, partial);
  if (!config_.pre_norm) dev_.LayerNorm(x, x, w.mlp_norm);
}

void OptModel::Head(const Batch& batch, float* logits) {
  const int64_t n = static_cast<int64_t>(batch.logit_rows.size());
  const Tensor ids = logit_rows_.Cols(0, n);
  dev_.Upload(ids, batch.logit_rows.data());
  Tensor last = last_.Rows(0, n);
  dev_.GatherRows(last, x_.Rows(0, batch.rows()), ids);
  if (config_.final_norm) dev_.LayerNorm(last, last, weights_.final_norm);
  if (!weights_.project_out.weight.empty()) {
    const Tensor projected = projected_.Rows(0, n);
    dev_.Linear(projected, last, weights_.project_out);
    last = projected;
  }
  dev_.Linear(logits_.Rows(0, n), last, weights_.head);
  dev_.Download(logits, logits_.Rows(0, n));
}

}  // namespace dejavu
