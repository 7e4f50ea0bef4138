#include "engine/opt_model.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/status_macros.h"
#include "kernels/layout.h"

namespace dejavu {

absl::StatusOr<std::unique_ptr<OptModel>> OptModel::Create(const OptConfig& config, const OptWeights& weights,
                                                           Backend& backend, Communicator& communicator,
                                                           Predictor& predictor, const Batch& largest) {
  std::unique_ptr<OptModel> model(new OptModel(config, weights, backend, communicator, predictor));
  RETURN_IF_ERROR(model->Allocate(largest));
  return model;
}

absl::Status OptModel::Allocate(const Batch& largest) {
  const int64_t rows = largest.max_rows, logit_rows = largest.max_logit_rows, hidden = config_.hidden;
  const int64_t embed = config_.embed == config_.hidden ? 0 : config_.embed;
  DeviceLayout floats, ints;
  floats.Reserve(&x_, DType::kFloat32, rows, hidden);
  floats.Reserve(&h_, DType::kFloat32, rows, hidden);
  floats.Reserve(&qkv_, DType::kFloat32, rows, 3 * hidden);
  floats.Reserve(&context_, DType::kFloat32, rows, hidden);
  floats.Reserve(&partial_, DType::kFloat32, rows, hidden);
  floats.Reserve(&neurons_, DType::kFloat32, rows, config_.ffn);
  floats.Reserve(&embedded_, DType::kFloat32, rows, embed);
  floats.Reserve(&last_, DType::kFloat32, logit_rows, hidden);
  floats.Reserve(&projected_, DType::kFloat32, logit_rows, embed);
  floats.Reserve(&logits_, DType::kFloat32, logit_rows, config_.vocab);
  ints.Reserve(&tokens_, DType::kInt32, 1, rows);
  ints.Reserve(&positions_, DType::kInt32, 1, rows);
  ints.Reserve(&row_slots_, DType::kInt32, 1, rows);
  ints.Reserve(&logit_rows_, DType::kInt32, 1, logit_rows);
  ints.Reserve(&draws_, DType::kInt32, logit_rows, kDrawFields);
  ints.Reserve(&drawn_, DType::kInt32, 1, logit_rows);
  ints.Reserve(&block_table_, DType::kInt32, largest.slots, largest.blocks_per_slot);
  ASSIGN_OR_RETURN(floats_, floats.Allocate(dev_));
  ASSIGN_OR_RETURN(ints_, ints.Allocate(dev_));
  return absl::OkStatus();
}

void OptModel::Forward(const Batch& batch, const KvCache& kv, float* logits, StepCounts* counts, int32_t* drawn,
                       int32_t candidates) {
  const RowTable rows = Upload(batch);
  predictor_.BeginStep(batch);
  skip_zeros_ = std::find(batch.tiers.begin(), batch.tiers.end(), Tier::kDense) == batch.tiers.end();
  const auto logit_rows = static_cast<int64_t>(batch.logit_rows.size());
  const bool draws = !batch.draws.empty();
  dev_.Run(StepKey(batch), [&] {
    Embed(rows);
    for (int32_t l = 0; l < config_.layers; ++l) Layer(l, kv.layer(l), rows);
    if (observer_ != nullptr) observer_->OnInput(config_.layers, Tap::kAttentionNorm, x_.Rows(0, batch.rows()));
    if (logit_rows > 0) Head(logit_rows, rows.rows());
    if (draws)
      dev_.Draw(drawn_.Cols(0, logit_rows), logits_.Rows(0, logit_rows), draws_.Rows(0, logit_rows), candidates);
  });
  if (draws) {
    dev_.Download(drawn, drawn_.Cols(0, logit_rows));
  } else if (logit_rows > 0) {
    dev_.Download(logits, logits_.Rows(0, logit_rows));
  }
  if (counts != nullptr) {
    counts->skipped_zeros = skip_zeros_;
    predictor_.EndStep(counts);
  } else {
    dev_.Synchronize();
  }
}

// Steps that decode come again and again in the same shape; a step with a piece of a prompt hardly ever does.
uint64_t OptModel::StepKey(const Batch& batch) const {
  if (batch.decode_rows < batch.rows() || observer_ != nullptr) return Backend::kOnce;
  const uint64_t key = predictor_.step_key() * 31 + batch.logit_rows.size();
  return std::max<uint64_t>(1, key * 4 + 2 * skip_zeros_ + batch.draws.empty());
}

RowTable OptModel::Upload(const Batch& batch) {
  const int64_t n = batch.rows();
  CHECK(n > 0 && n <= x_.rows) << n << " rows, capacity " << x_.rows;
  RowTable rows{positions_.Cols(0, n), row_slots_.Cols(0, n), block_table_};
  dev_.Upload(tokens_.Cols(0, n), batch.tokens.data());
  dev_.Upload(rows.positions, batch.positions.data());
  dev_.Upload(rows.sequences, batch.row_slots.data());
  dev_.Upload(rows.block_table, batch.block_table.data());
  if (!batch.logit_rows.empty()) {
    const auto n = static_cast<int64_t>(batch.logit_rows.size());
    dev_.Upload(logit_rows_.Cols(0, n), batch.logit_rows.data());
    CHECK(batch.draws.empty() || batch.draws.size() == batch.logit_rows.size()) << batch.draws.size() << " draws";
    if (!batch.draws.empty()) dev_.Upload(draws_.Rows(0, n), batch.draws.data());
  }
  return rows;
}

void OptModel::Embed(const RowTable& rows) {
  const Tensor x = x_.Rows(0, rows.rows()), tokens = tokens_.Cols(0, rows.rows());
  if (weights_.project_in.weight.empty()) {
    dev_.Embed(x, tokens, weights_.token_embedding, 0, /*accumulate=*/false);
  } else {
    const Tensor embedded = embedded_.Rows(0, rows.rows());
    dev_.Embed(embedded, tokens, weights_.token_embedding, 0, /*accumulate=*/false);
    dev_.Linear(x, embedded, weights_.project_in);
  }
  dev_.Embed(x, rows.positions, {weights_.position_embedding, {}}, kPositionOffset, /*accumulate=*/true);
}

// Pre-norm: x += attention(norm(x)); x += mlp(norm(x)). Post-norm (OPT-350m): x = norm(x + attention(x)); x = norm(x +
// mlp(x)).
void OptModel::Layer(int32_t l, const KvLayer& kv, const RowTable& rows) {
  const LayerWeights& w = weights_.layers[l];
  const int64_t n = rows.rows();
  const Tensor x = x_.Rows(0, n), h = config_.pre_norm ? h_.Rows(0, n) : x, qkv = qkv_.Rows(0, n);
  const Tensor context = context_.Rows(0, n), partial = partial_.Rows(0, n);
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));

  if (config_.pre_norm) dev_.LayerNorm(h, x, w.attention_norm);
  if (observer_ != nullptr) observer_->OnInput(l, Tap::kAttentionNorm, h);
  const Selection heads = ProjectQkv(l, qkv, h);
  dev_.WriteKv(kv, qkv, rows);
  dev_.Attention(context, qkv, kv, rows, scale, heads);
  if (observer_ != nullptr) observer_->OnContext(l, context);
  dev_.Linear(partial, context, w.out, heads, config_.head_dim);
  comm_.AllReduce(partial);
  dev_.Add(x, partial);
  if (!config_.pre_norm) dev_.LayerNorm(x, x, w.attention_norm);

  if (config_.pre_norm) dev_.LayerNorm(h, x, w.mlp_norm);
  if (observer_ != nullptr) observer_->OnInput(l, Tap::kMlpNorm, h);
  const Selection neurons = SelectNeurons(l, h);
  dev_.Mlp(partial, h, w.mlp, neurons, skip_zeros_, neurons_.Rows(0, n), predictor_.ActiveCounts(l));
  if (observer_ != nullptr) observer_->OnMlp(l, neurons_.Rows(0, n), partial);
  comm_.AllReduce(partial);
  dev_.Add(x, partial);
  if (!config_.pre_norm) dev_.LayerNorm(x, x, w.mlp_norm);
}

// The predictor's first stage rides along. Where heads are chosen, K and V (of every head: one that is skipped now may
// be wanted later) come first, then Q of the chosen ones.
Selection OptModel::ProjectQkv(int32_t l, Tensor qkv, Tensor h) {
  const LinearWeights& w = weights_.layers[l].qkv;
  const Ride ride = predictor_.RideAlong(l, Tap::kAttentionNorm);
  if (!predictor_.SelectsHeads(l)) {
    dev_.Linear(qkv, h, w, {}, 1, ride);
    return {};
  }
  const int64_t hidden = config_.hidden;
  const auto part = [&](int64_t first, int64_t count) {
    LinearWeights view = w;
    view.weight = w.weight.Rows(first, count);
    if (!w.scale.empty()) view.scale = w.scale.Cols(first, count);
    if (!w.bias.empty()) view.bias = w.bias.Cols(first, count);
    return view;
  };
  dev_.Linear(qkv.Cols(hidden, 2 * hidden), h, part(hidden, 2 * hidden), {}, 1, ride);
  const Selection heads = predictor_.Heads(l);
  dev_.Linear(qkv.Cols(0, hidden), h, part(0, hidden), heads, config_.head_dim);
  return heads;
}

// `h` is the input of the MLP.
Selection OptModel::SelectNeurons(int32_t l, Tensor h) {
  const auto compute = [&](const Ride& ride) {
    if (ride.w != nullptr) dev_.Linear(ride.y, h, *ride.w);
  };
  compute(predictor_.RideAlong(l, Tap::kMlpNorm));
  const Selection neurons = predictor_.Neurons(l);
  predictor_.Audit(l, h, weights_.layers[l].mlp.up);
  compute(predictor_.RideAlong(l, Tap::kPreviousLayer));
  return neurons;
}

// The logits of the first `n` of logit_rows_, which name rows of a step of `rows`.
void OptModel::Head(int64_t n, int64_t rows) {
  Tensor last = last_.Rows(0, n);
  dev_.GatherRows(last, x_.Rows(0, rows), logit_rows_.Cols(0, n));
  if (config_.final_norm) dev_.LayerNorm(last, last, weights_.final_norm);
  if (!weights_.project_out.weight.empty()) {
    const Tensor projected = projected_.Rows(0, n);
    dev_.Linear(projected, last, weights_.project_out);
    last = projected;
  }
  dev_.Linear(logits_.Rows(0, n), last, weights_.head);
}

}  // namespace dejavu
