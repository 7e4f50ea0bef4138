#include "engine/model/opt_model.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/base/status_macros.h"
#include "kernels/layout.h"

namespace dejavu {
namespace {

int64_t LongestVocabRange(const OptConfig& config, const Shard& shard) {
  return Shard::RangeOf(config.vocab, 0, shard.ranks).count;
}

// What adds up over the ranks: `ints` and `floats` are called with each array that the step has filled, always in the
// same order.
template <typename Ints, typename Floats>
void ForEachCount(StepCounts& counts, const Ints& ints, const Floats& floats) {
  const size_t layers = counts.union_selected.size(), rows = counts.decode_rows;
  ints(counts.selected.data(), layers * rows);
  ints(counts.active.data(), layers * (rows + 1));
  ints(counts.heads.data(), layers * rows);
  ints(counts.union_selected.data(), layers);
  ints(counts.union_heads.data(), layers);
  ints(counts.saturated.data(), counts.packed_rows);
  floats(counts.audits.data(), layers * counts.audit_rows * kAuditFields);
}

// Of the largest step.
size_t WordsOf(const StepCounts& counts) {
  return counts.selected.size() + counts.active.size() + counts.heads.size() + counts.union_selected.size() +
         counts.union_heads.size() + counts.saturated.size() + counts.audits.size();
}

}  // namespace

absl::StatusOr<std::unique_ptr<OptModel>> OptModel::Create(const OptConfig& config, const Shard& shard,
                                                           const OptWeights& weights, Backend& backend,
                                                           Communicator& communicator, Predictor& predictor,
                                                           const Batch& largest, int32_t candidates,
                                                           const DraftWeights* drafts) {
  CHECK(shard.rank == communicator.rank() && shard.ranks == communicator.size())
      << "shard " << shard.rank << " of " << shard.ranks << " for rank " << communicator.rank() << " of "
      << communicator.size();
  std::unique_ptr<OptModel> model(
      new OptModel(config, shard, weights, backend, communicator, predictor, candidates, drafts));
  RETURN_IF_ERROR(model->Allocate(largest));
  return model;
}

absl::Status OptModel::Allocate(const Batch& largest) {
  const int64_t rows = largest.max_rows, logit_rows = largest.max_logit_rows, hidden = config_.hidden;
  const int64_t embed = config_.embed == config_.hidden ? 0 : config_.embed;
  const int64_t width = int64_t{shard_.heads.count} * config_.head_dim;
  DeviceLayout floats, ints;
  floats.Reserve(&x_, DType::kFloat32, rows, hidden);
  floats.Reserve(&h_, DType::kFloat32, rows, hidden);
  floats.Reserve(&qkv_, DType::kFloat32, rows, 3 * width);
  floats.Reserve(&context_, DType::kFloat32, rows, width);
  floats.Reserve(&partial_, DType::kFloat32, rows, hidden);
  floats.Reserve(&nothing_, DType::kFloat32, 1, width == 0 ? hidden : 0);
  floats.Reserve(&neurons_, DType::kFloat32, rows, shard_.neuron_count);
  floats.Reserve(&embedded_, DType::kFloat32, rows, embed);
  floats.Reserve(&last_, DType::kFloat32, logit_rows, hidden);
  floats.Reserve(&projected_, DType::kFloat32, logit_rows, embed);
  floats.Reserve(&logits_, DType::kFloat32, logit_rows, shard_.vocab.count);
  floats.Reserve(&bests_, DType::kFloat32, logit_rows, shard_.whole() ? 0 : kBestFields);
  floats.Reserve(&scratch_, DType::kFloat32, 1, shard_.whole() ? Batch::kMostAdjustments : 0);
  ints.Reserve(&drawn_, DType::kInt32, 1, logit_rows);
  ints.Reserve(&details_, DType::kInt32, logit_rows, shard_.whole() ? kDetailFields : 0);
  ints.Reserve(&no_head_, DType::kInt32, 1, width == 0 ? rows : 0);
  ASSIGN_OR_RETURN(floats_, floats.Allocate(dev_));
  ASSIGN_OR_RETURN(ints_, ints.Allocate(dev_));
  const int64_t input_words = 4 * StepInputs::WordsOf(1, rows) + StepInputs::WordsOf(1, logit_rows) +
                              StepInputs::WordsOf(logit_rows, kDrawFields) +
                              StepInputs::WordsOf(scratch_.cols, kAdjustFields) + predictor_.input_words();
  ASSIGN_OR_RETURN(inputs_, StepInputs::Create(dev_, largest, input_words));
  if (!nothing_.empty()) {
    dev_.Upload(nothing_, std::vector<float>(hidden).data());
    dev_.Upload(no_head_, std::vector<int32_t>(rows).data());
    dev_.Synchronize();
  }
  if (shard_.whole()) return absl::OkStatus();
  const size_t longest = LongestVocabRange(config_, shard_);
  own_logits_.resize(logit_rows * longest);
  own_results_.resize(std::max<size_t>(logit_rows * (1 + kBestFields), WordsOf(predictor_.MakeCounts())));
  if (shard_.first()) {
    all_logits_.resize(own_logits_.size() * shard_.ranks);
    all_results_.resize(own_results_.size() * shard_.ranks);
  }
  return absl::OkStatus();
}

uint64_t OptModel::Launch(const Batch& batch, const KvCache& kv, const StepOutputs& out) {
  const RowTable rows = Upload(batch);
  skip_zeros_ = std::find(batch.tiers.begin(), batch.tiers.end(), Tier::kDense) == batch.tiers.end();
  step_weights_ = batch.drafts && drafts_ != nullptr ? &drafts_->weights() : &weights_;
  const auto logit_rows = static_cast<int64_t>(batch.logit_rows.size());
  const bool draws = !batch.draws.empty();
  const Tensor drawn = drawn_.Cols(0, logit_rows);
  dev_.Run(StepKey(batch), [&] {
    Embed(rows);
    for (int32_t l = 0; l < config_.layers; ++l) Layer(l, kv.layer(l), rows);
    if (observer_ != nullptr) observer_->OnInput(config_.layers, Tap::kAttentionNorm, x_.Rows(0, batch.rows()));
    if (logit_rows > 0) Head(logit_rows, rows.rows());
    if (draws) {
      DrawDetails details;
      if (shard_.whole()) {
        details = {adjustments_, scratch_.Cols(0, adjustments_.rows), details_.Rows(0, logit_rows)};
      }
      dev_.Draw(drawn, bests_.empty() ? Tensor{} : bests_.Rows(0, logit_rows), logits_.Rows(0, logit_rows), draws_,
                {shard_.vocab.first, candidates_}, details);
    }
  });
  if (draws) {
    dev_.Download(shard_.whole() ? out.drawn : own_results_.data(), drawn);
    if (!bests_.empty()) dev_.Download(own_results_.data() + logit_rows, bests_.Rows(0, logit_rows));
    const int32_t fields = batch.detail_fields();
    if (fields > 0) dev_.Download(out.details, details_.Rows(0, logit_rows).Cols(0, fields));
  }
  if (logit_rows > 0 && (!draws || batch.keeps_logits)) {
    dev_.Download(shard_.whole() ? out.logits : own_logits_.data(), logits_.Rows(0, logit_rows));
  }
  if (out.counts != nullptr) {
    out.counts->skipped_zeros = skip_zeros_;
    const auto first = batch.tiers.begin();
    const bool dense = std::all_of(first, first + batch.decode_rows, [](Tier tier) { return tier == Tier::kDense; });
    predictor_.EndStep(out.counts, /*wanted=*/!dense || out.counts_dense || !shard_.whole());
    if (kv.layer(0).dtype != DType::kFloat32) dev_.Download(out.counts->saturated.data(), rows.saturated);
  }
  return dev_.Mark();
}

void OptModel::Await(uint64_t mark, const Batch& batch, const StepOutputs& out) {
  dev_.Await(mark);
  if (out.counts != nullptr) predictor_.Complete(out.counts);
  if (shard_.whole()) return;
  if (!batch.draws.empty()) {
    GatherDrawn(batch, out.drawn);
  } else if (!batch.logit_rows.empty()) {
    GatherLogits(static_cast<int64_t>(batch.logit_rows.size()), out.logits);
  }
  if (out.counts != nullptr) GatherCounts(out.counts);
}

// Each rank has drawn the best of its own ids; the best of those is the draw, the lowest id of equals.
void OptModel::GatherDrawn(const Batch& batch, int32_t* drawn) {
  const auto n = static_cast<int64_t>(batch.logit_rows.size()), words = n * (1 + kBestFields);
  comm_.Gather(all_results_.data(), own_results_.data(), words * int64_t{sizeof(int32_t)});
  if (!shard_.first()) return;
  for (int64_t i = 0; i < n; ++i) {
    const auto temperature = std::bit_cast<float>(batch.draws[i][kDrawTemperature]);
    const double inverse = temperature == 0.0f ? 1.0 : 1.0 / static_cast<double>(temperature);
    double best = -std::numeric_limits<double>::infinity();
    for (int rank = 0; rank < shard_.ranks; ++rank) {
      const int32_t* const of_rank = all_results_.data() + rank * words;
      if (of_rank[i] < 0) {
        drawn[i] = of_rank[i];
        break;
      }
      if (of_rank[i] >= candidates_) continue;  // it has none
      const int32_t* const bests = of_rank + n + i * kBestFields;
      const double worth = static_cast<double>(std::bit_cast<float>(bests[kBestLogit])) * inverse +
                           static_cast<double>(std::bit_cast<float>(bests[kBestScore]));
      if (worth > best) {
        best = worth;
        drawn[i] = of_rank[i];
      }
    }
  }
}

void OptModel::GatherLogits(int64_t rows, float* logits) {
  const int64_t floats = rows * LongestVocabRange(config_, shard_);  // own ones are packed at the front
  comm_.Gather(all_logits_.data(), own_logits_.data(), floats * int64_t{sizeof(float)});
  if (!shard_.first()) return;
  for (int rank = 0; rank < shard_.ranks; ++rank) {
    const Shard::Range range = Shard::RangeOf(config_.vocab, rank, shard_.ranks);
    const float* from = all_logits_.data() + rank * floats;
    for (int64_t r = 0; r < rows; ++r, from += range.count) {
      std::copy_n(from, range.count, logits + r * config_.vocab + range.first);
    }
  }
}

// The ranks' neurons and heads are different ones, so everything adds up.
void OptModel::GatherCounts(StepCounts* counts) {
  int64_t words = 0;
  ForEachCount(
      *counts,
      [&](int32_t* values, size_t count) {
        std::copy_n(values, count, own_results_.data() + words);
        words += static_cast<int64_t>(count);
      },
      [&](float* values, size_t count) {
        std::memcpy(own_results_.data() + words, values, count * sizeof(float));
        words += static_cast<int64_t>(count);
      });
  comm_.Gather(all_results_.data(), own_results_.data(), words * int64_t{sizeof(int32_t)});
  if (!shard_.first()) return;
  // Before the sums take the place of rank 0's own.
  double slowest = 0.0, sum = 0.0;
  for (int32_t l = 0; l < config_.layers; ++l) {
    // In the order of ForEachCount: a row's active counts follow those selected.
    const int64_t selected = int64_t{config_.layers} * counts->decode_rows;
    const int64_t at = selected + int64_t{l} * (counts->decode_rows + 1) + counts->decode_rows;
    int32_t most = 0;
    for (int rank = 0; rank < shard_.ranks; ++rank) {
      const int32_t active = all_results_[rank * words + at];
      most = std::max(most, active);
      sum += active;
    }
    slowest += most;
  }
  counts->ranks = shard_.ranks;
  counts->imbalance = sum > 0.0 ? slowest * shard_.ranks / sum : 1.0;
  for (int rank = 1; rank < shard_.ranks; ++rank) {
    const int32_t* from = all_results_.data() + rank * words;
    ForEachCount(
        *counts,
        [&](int32_t* values, size_t count) {
          for (size_t i = 0; i < count; ++i) values[i] += from[i];
          from += count;
        },
        [&](float* values, size_t count) {
          for (size_t i = 0; i < count; ++i) values[i] += std::bit_cast<float>(from[i]);
          from += count;
        });
  }
}

// Steps that decode come again and again in the same shape; a step with a piece of a prompt hardly ever does.
uint64_t OptModel::StepKey(const Batch& batch) const {
  if (batch.decode_rows < batch.rows() || observer_ != nullptr) return Backend::kOnce;
  const uint64_t key = predictor_.step_key() * 31 + batch.logit_rows.size();
  const bool drafts = step_weights_ != &weights_;
  return std::max<uint64_t>(1, key * 8 + 4 * drafts + 2 * skip_zeros_ + batch.draws.empty());
}

RowTable OptModel::Upload(const Batch& batch) {
  const int64_t n = batch.rows();
  CHECK(n > 0 && n <= x_.rows) << n << " rows, capacity " << x_.rows;
  CHECK(batch.draws.empty() || batch.draws.size() == batch.logit_rows.size()) << batch.draws.size() << " draws";
  CHECK(shard_.whole() || (batch.adjustments.empty() && !batch.keeps_logits)) << "more than a group of ranks can draw";
  inputs_->Begin(batch);
  tokens_ = inputs_->Add(batch.tokens);
  const Tensor positions = inputs_->Add(batch.positions), slots = inputs_->Add(batch.row_slots);
  const StepInputs::Array saturated = inputs_->Add(1, n);
  std::fill_n(saturated.values, n, 0);
  const RowTable rows{positions, slots, inputs_->block_table(), saturated.on_device};
  logit_rows_ = inputs_->Add(batch.logit_rows);
  if (!batch.draws.empty()) {
    const StepInputs::Array draws = inputs_->Add(static_cast<int64_t>(batch.draws.size()), kDrawFields);
    std::memcpy(draws.values, batch.draws.data(), draws.on_device.bytes());
    draws_ = draws.on_device;
  }
  predictor_.BeginStep(batch, *inputs_);
  // The last ones: how many there are moves nothing else.
  const StepInputs::Array adjustments = inputs_->Add(static_cast<int64_t>(batch.adjustments.size()), kAdjustFields);
  if (!batch.adjustments.empty()) {
    std::memcpy(adjustments.values, batch.adjustments.data(), adjustments.on_device.bytes());
  }
  adjustments_ = adjustments.on_device;
  inputs_->Send();
  return rows;
}

void OptModel::Embed(const RowTable& rows) {
  const Tensor x = x_.Rows(0, rows.rows());
  const bool projects = !step_weights_->project_in.weight.empty();
  const Tensor embedded = projects ? embedded_.Rows(0, rows.rows()) : x;
  dev_.Embed(embedded, tokens_, step_weights_->token_embedding, -shard_.vocab.first, /*accumulate=*/false, drawn_);
  comm_.AllReduce(embedded);  // zero but on the rank that has the token
  if (projects) dev_.Linear(x, embedded, step_weights_->project_in);
  dev_.Embed(x, rows.positions, {step_weights_->position_embedding, {}}, kPositionOffset, /*accumulate=*/true);
}

// Pre-norm: x += attention(norm(x)); x += mlp(norm(x)). Post-norm (OPT-350m): x = norm(x + attention(x)); x = norm(x +
// mlp(x)).
void OptModel::Layer(int32_t l, const KvLayer& kv, const RowTable& rows) {
  const LayerWeights& w = step_weights_->layers[l];
  const int64_t n = rows.rows();
  const Tensor x = x_.Rows(0, n), h = config_.pre_norm ? h_.Rows(0, n) : x, partial = partial_.Rows(0, n);

  if (config_.pre_norm) dev_.LayerNorm(h, x, w.attention_norm);
  if (observer_ != nullptr) observer_->OnInput(l, Tap::kAttentionNorm, h);
  // A selection that need not wait for the attention goes beside it, so that the up-projection finds its list in time;
  // a group's runs beside the sum that the norm waits for.
  const bool early = predictor_.PredictsEarly(l), alone = comm_.size() == 1;
  Selection neurons;
  Attend(l, kv, rows, partial, h, early && alone ? &neurons : nullptr);
  if (early && !alone) {
    comm_.AllReduceBeside(partial, [&] { neurons = predictor_.Neurons(l); });
  } else {
    comm_.AllReduce(partial);
  }
  dev_.Add(x, partial);
  if (!config_.pre_norm) dev_.LayerNorm(x, x, w.attention_norm);

  if (config_.pre_norm) dev_.LayerNorm(h, x, w.mlp_norm);
  if (observer_ != nullptr) observer_->OnInput(l, Tap::kMlpNorm, h);
  if (!early) {
    Compute(predictor_.StageA(l, Tap::kMlpNorm), h);
    neurons = predictor_.Neurons(l);
  }
  predictor_.Audit(l, h, w.mlp.up);
  Compute(predictor_.StageA(l, Tap::kPreviousLayer), h);
  dev_.Mlp(partial, h, w.mlp, neurons, skip_zeros_, neurons_.Rows(0, n), predictor_.ActiveCounts(l));
  if (observer_ != nullptr) observer_->OnMlp(l, neurons_.Rows(0, n), partial);
  comm_.AllReduce(partial);
  dev_.Add(x, partial);
  if (!config_.pre_norm) dev_.LayerNorm(x, x, w.mlp_norm);
}

// This rank's heads of the input `h`, to `partial`. `neurons`, if wanted, are selected on the way.
void OptModel::Attend(int32_t l, const KvLayer& kv, const RowTable& rows, Tensor partial, Tensor h,
                      Selection* neurons) {
  const int64_t n = rows.rows();
  if (shard_.heads.count == 0) {
    Compute(predictor_.StageA(l, Tap::kAttentionNorm), h);
    dev_.GatherRows(partial, nothing_, no_head_.Cols(0, n));
    return;
  }
  const Tensor qkv = qkv_.Rows(0, n), context = context_.Rows(0, n);
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  const Selection heads = ProjectQkv(l, qkv, h);
  if (neurons != nullptr) *neurons = predictor_.Neurons(l);
  dev_.WriteKv(kv, qkv, rows);
  dev_.Attention(context, qkv, kv, rows, scale, heads);
  if (observer_ != nullptr) observer_->OnContext(l, context);
  dev_.Linear(partial, context, step_weights_->layers[l].out, heads, config_.head_dim);
}

void OptModel::Compute(const Ride& stage_a, Tensor x) {
  if (stage_a.w != nullptr) dev_.Linear(stage_a.y, x, *stage_a.w);
}

// The predictor's stage A is part of the product. Where heads are chosen, K and V (of every head: one that is skipped
// now may be wanted later) come first, then Q of the chosen ones.
Selection OptModel::ProjectQkv(int32_t l, Tensor qkv, Tensor h) {
  const LinearWeights& w = step_weights_->layers[l].qkv;
  const Ride stage_a = predictor_.StageA(l, Tap::kAttentionNorm);
  if (!predictor_.SelectsHeads(l)) {
    dev_.Linear(qkv, h, w, {}, 1, stage_a);
    return {};
  }
  const int64_t width = int64_t{shard_.heads.count} * config_.head_dim;
  const auto part = [&](int64_t first, int64_t count) {
    LinearWeights view = w;
    view.weight = w.weight.Rows(first, count);
    if (!w.scale.empty()) view.scale = w.scale.Cols(first, count);
    if (!w.bias.empty()) view.bias = w.bias.Cols(first, count);
    return view;
  };
  dev_.Linear(qkv.Cols(width, 2 * width), h, part(width, 2 * width), {}, 1, stage_a);
  const Selection heads = predictor_.Heads(l);
  dev_.Linear(qkv.Cols(0, width), h, part(0, width), heads, config_.head_dim);
  return heads;
}

// The logits of the first `n` of logit_rows_, which name rows of a step of `rows`.
void OptModel::Head(int64_t n, int64_t rows) {
  Tensor last = last_.Rows(0, n);
  dev_.GatherRows(last, x_.Rows(0, rows), logit_rows_);
  if (config_.final_norm) dev_.LayerNorm(last, last, step_weights_->final_norm);
  if (!step_weights_->project_out.weight.empty()) {
    const Tensor projected = projected_.Rows(0, n);
    dev_.Linear(projected, last, step_weights_->project_out);
    last = projected;
  }
  dev_.Linear(logits_.Rows(0, n), last, step_weights_->head);
}

}  // namespace dejavu
