// Windows go through the model in groups, one window per slot. For each group every tier runs from position 0 on,
// through the same KV slots; DENSE runs first and leaves its logits for the others to be compared with. While it runs,
// only sums are kept; the figures follow from them at the end.
#include "engine/eval/evaluation.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/model/weight_bytes.h"
#include "engine/serving/compare_logits.h"
#include "engine/serving/sampler.h"
#include "kernels/base/status_macros.h"
#include "kernels/draw.h"

namespace dejavu {
namespace {

struct Window {
  int64_t first = 0;  // of its tokens in the stream
  int32_t rows = 0;   // one less than its tokens: the last one is only predicted
};

// A read is what loads weights once: a row, or with unions a step.
struct LayerSums {
  int64_t up_rows = 0, down_rows = 0, heads = 0;  // over the reads
  int64_t own_selected = 0, active = 0;           // over the rows
  std::array<double, kAuditFields> audit{};       // over the rows, where there is an operating point
  double missed_shares = 0.0;                     // of rows with any mass
  int64_t rows_with_mass = 0;

  LayerSums& operator+=(const LayerSums& other) {
    up_rows += other.up_rows;
    down_rows += other.down_rows;
    heads += other.heads;
    own_selected += other.own_selected;
    active += other.active;
    for (size_t i = 0; i < audit.size(); ++i) audit[i] += other.audit[i];
    missed_shares += other.missed_shares;
    rows_with_mass += other.rows_with_mass;
    return *this;
  }
};

struct TierSums {
  Tier tier = Tier::kDense;
  int64_t reads = 0, rows = 0, agreements = 0;
  double negative_log_likelihood = 0.0, kl_nats = 0.0;
  std::vector<LayerSums> layers;
};

double Ratio(double part, double whole) {
  return whole > 0.0 ? part / whole : std::numeric_limits<double>::quiet_NaN();
}

class Evaluator {
 public:
  Evaluator(ModelRunner& runner, const PredictorData* predictor, absl::Span<const int32_t> tokens,
            const EvaluationOptions& options, const EvaluationProgress& progress)
      : runner_(runner),
        config_(runner.config()),
        predictor_(predictor),
        tokens_(tokens),
        options_(options),
        progress_(progress),
        sampler_(config_.vocab, config_.vocab) {}

  absl::StatusOr<Evaluation> Run();

 private:
  absl::Status Check() const;
  absl::Status CheckTier(Tier tier) const;
  absl::Status CutWindows();
  absl::Status RunGroup(absl::Span<const Window> group, TierSums& sums);
  absl::Status NoteLogits(const Window& window, int32_t slot, int32_t position, const float* logits, TierSums& sums);
  void NoteReads(const Batch& batch, const StepCounts& counts, TierSums& sums) const;
  TierEvaluation Figures(const TierSums& sums) const;
  ReadFigures Figures(const LayerSums& sums, const TierSums& tier, double layers, bool predicted) const;
  double MlpByteShare(const TierSums& sums, int32_t layer) const;
  double BytesPerToken(const TierSums& sums) const;

  // The row of DENSE's logits for a slot's position.
  float* DenseRow(int32_t slot, int32_t position) {
    return &dense_logits_[(static_cast<size_t>(slot) * (runner_.options().window - 1) + position) * config_.vocab];
  }

  ModelRunner& runner_;
  const OptConfig& config_;
  const PredictorData* const predictor_;
  const absl::Span<const int32_t> tokens_;
  const EvaluationOptions& options_;
  const EvaluationProgress& progress_;

  Sampler sampler_;
  std::vector<Window> windows_;
  std::vector<float> dense_logits_;  // [slots, window - 1, vocab] of the group
  int64_t done_rows_ = 0, total_rows_ = 0;
};

absl::Status Evaluator::CheckTier(Tier tier) const {
  if (!IsPredicted(tier)) return absl::OkStatus();
  if (predictor_ == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("tier ", Name(tier), " needs a predictor, and none is loaded (see dejavu-calibrate)"));
  }
  if (std::find(predictor_->tiers.begin(), predictor_->tiers.end(), tier) == predictor_->tiers.end()) {
    return absl::FailedPreconditionError(absl::StrCat("the predictor has no operating point for tier ", Name(tier)));
  }
  CHECK(runner_.options().max_audits >= runner_.options().max_rows) << runner_.options().max_audits << " audits";
  return absl::OkStatus();
}

absl::Status Evaluator::Check() const {
  CHECK(runner_.options().max_rows >= runner_.options().slots) << runner_.options().max_rows << " rows";
  for (const Tier tier : options_.tiers) RETURN_IF_ERROR(CheckTier(tier));
  for (const int32_t id : tokens_) {
    if (id >= 0 && id < config_.vocab) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("the text has token ", id, "; the model knows ", config_.vocab, " tokens"));
  }
  return absl::OkStatus();
}

absl::Status Evaluator::CutWindows() {
  const int64_t window = runner_.options().window, slots = runner_.options().slots;
  const auto total = static_cast<int64_t>(tokens_.size());
  for (int64_t first = 0; first + 2 <= total; first += window) {
    windows_.push_back({first, static_cast<int32_t>(std::min(window, total - first)) - 1});
  }
  if (windows_.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("the text has ", total, " tokens; at least 2 are needed"));
  }
  if (options_.union_of_rows) {
    windows_.resize(total / window / slots * slots);
    if (windows_.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("the text has ", total, " tokens; a union of ", slots,
                                                     " windows of ", window, " needs ", slots * window));
    }
  }
  for (const Window& w : windows_) total_rows_ += w.rows;
  return absl::OkStatus();
}

absl::StatusOr<Evaluation> Evaluator::Run() {
  RETURN_IF_ERROR(Check());
  RETURN_IF_ERROR(CutWindows());
  Evaluation evaluation;
  evaluation.weight_dtype = runner_.weights().dtype();
  evaluation.tokens = total_rows_;
  RETURN_IF_ERROR(runner_.SetPredictor(predictor_));

  std::vector<TierSums> sums(1);  // DENSE, wanted or not
  for (const Tier tier : options_.tiers) {
    if (tier != Tier::kDense) sums.emplace_back().tier = tier;
  }
  for (TierSums& s : sums) s.layers.resize(config_.layers);
  total_rows_ *= static_cast<int64_t>(sums.size());
  const size_t slots = std::min<size_t>(runner_.options().slots, windows_.size());
  dense_logits_.resize(slots * (runner_.options().window - 1) * config_.vocab);
  for (size_t first = 0; first < windows_.size(); first += slots) {
    const auto group = absl::MakeConstSpan(windows_).subspan(first, slots);
    for (TierSums& s : sums) RETURN_IF_ERROR(RunGroup(group, s));
  }

  const TierEvaluation dense = Figures(sums[0]);
  for (const Tier tier : options_.tiers) {
    const auto found = std::find_if(sums.begin(), sums.end(), [&](const TierSums& s) { return s.tier == tier; });
    TierEvaluation& e = evaluation.tiers.emplace_back(Figures(*found));
    e.perplexity_change = e.perplexity / dense.perplexity - 1.0;
    e.byte_ceiling = dense.weight_bytes_per_token / e.weight_bytes_per_token;
  }
  return evaluation;
}

// All rows are decode rows. Without unions they are strict, so several positions of a window may share a step.
absl::Status Evaluator::RunGroup(absl::Span<const Window> group, TierSums& sums) {
  const auto slots = static_cast<int32_t>(group.size());
  const int32_t chunk = options_.union_of_rows ? 1 : runner_.options().max_rows / slots;
  SparsityParams sparsity;
  sparsity.tier = sums.tier;
  sparsity.deterministic = !options_.union_of_rows;
  const int32_t longest = group.front().rows;  // only the last window of all may be shorter
  for (int32_t start = 0; start < longest; start += chunk) {
    Batch& batch = runner_.StartBatch();
    for (int32_t slot = 0; slot < slots; ++slot) {
      for (int32_t i = start; i < std::min(start + chunk, group[slot].rows); ++i) {
        if (IsPredicted(sums.tier)) batch.audit_rows.push_back(batch.rows());
        batch.AddDecodeRow(slot, i, tokens_[group[slot].first + i], /*wants_logits=*/true, sparsity);
      }
    }
    const absl::Span<const float> logits = runner_.Run();
    for (int32_t r = 0; r < batch.rows(); ++r) {
      const int32_t slot = batch.row_slots[r];
      RETURN_IF_ERROR(NoteLogits(group[slot], slot, batch.positions[r],
                                 logits.data() + static_cast<size_t>(r) * config_.vocab, sums));
    }
    NoteReads(batch, runner_.counts(), sums);
    done_rows_ += batch.rows();
    if (progress_ && !progress_(done_rows_, total_rows_)) return absl::CancelledError("the evaluation was stopped");
  }
  return absl::OkStatus();
}

absl::Status Evaluator::NoteLogits(const Window& window, int32_t slot, int32_t position, const float* logits,
                                   TierSums& sums) {
  if (!AllFinite(logits, config_.vocab)) {
    return absl::DataLossError(absl::StrCat("tier ", Name(sums.tier), " computes logits that are not finite at token ",
                                            window.first + position));
  }
  const int32_t next = tokens_[window.first + position + 1];
  sums.negative_log_likelihood -= static_cast<double>(sampler_.Describe(logits, next).logprob);
  if (sums.tier == Tier::kDense) {
    std::copy_n(logits, config_.vocab, DenseRow(slot, position));
    ++sums.agreements;
    return absl::OkStatus();
  }
  const LogitsComparison comparison = CompareLogits(DenseRow(slot, position), logits, config_.vocab);
  sums.agreements += comparison.same_top;
  sums.kl_nats += comparison.kl_nats;
  return absl::OkStatus();
}

void Evaluator::NoteReads(const Batch& batch, const StepCounts& counts, TierSums& sums) const {
  const int32_t rows = batch.rows();
  sums.rows += rows;
  sums.reads += options_.union_of_rows ? 1 : rows;
  for (int32_t l = 0; l < config_.layers; ++l) {
    LayerSums& layer = sums.layers[l];
    for (int32_t r = 0; r < rows; ++r) {
      layer.own_selected += counts.selected_of(l, r);
      layer.active += counts.active_of(l, r);
      if (options_.union_of_rows) continue;
      layer.up_rows += counts.selected_of(l, r);
      layer.down_rows += sums.tier == Tier::kDense ? config_.ffn : counts.active_of(l, r);
      layer.heads += counts.heads_of(l, r);
    }
    if (options_.union_of_rows) {
      layer.up_rows += counts.union_selected[l];
      layer.down_rows += counts.union_down_of(l);
      layer.heads += counts.union_heads[l];
    }
    if (!runner_.predictor().HasNeuronPoint(l, sums.tier)) continue;
    for (int32_t r = 0; r < rows; ++r) {
      const float* const found = counts.audit_of(l, r);
      for (int f = 0; f < kAuditFields; ++f) layer.audit[f] += found[f];
      if (found[kAuditMass] <= 0.0f) continue;
      layer.missed_shares += double{found[kAuditMissedMass]} / found[kAuditMass];
      ++layer.rows_with_mass;
    }
  }
}

// All but the byte share. `sums` are of so many layers; `predicted`: some have an operating point.
ReadFigures Evaluator::Figures(const LayerSums& sums, const TierSums& tier, double layers, bool predicted) const {
  const double reads = static_cast<double>(tier.reads) * layers, rows = static_cast<double>(tier.rows) * layers;
  ReadFigures figures;
  figures.mlp_selected = static_cast<double>(sums.up_rows) / (reads * config_.ffn);
  figures.mlp_active = static_cast<double>(sums.down_rows) / (reads * config_.ffn);
  figures.mlp_own_selected = static_cast<double>(sums.own_selected) / (rows * config_.ffn);
  figures.head_density = static_cast<double>(sums.heads) / (reads * config_.heads);
  if (predicted) {
    figures.recall = Ratio(sums.audit[kAuditHits], sums.audit[kAuditActive]);
    figures.precision = Ratio(sums.audit[kAuditHits], sums.audit[kAuditSelected]);
    figures.missed_mass = Ratio(sums.audit[kAuditMissedMass], sums.audit[kAuditMass]);
    figures.missed_share = Ratio(sums.missed_shares, static_cast<double>(sums.rows_with_mass));
  } else {
    figures.recall = 1.0;
    figures.precision = static_cast<double>(sums.active) / (rows * config_.ffn);
    figures.missed_mass = figures.missed_share = 0.0;
  }
  return figures;
}

TierEvaluation Evaluator::Figures(const TierSums& sums) const {
  const auto rows = static_cast<double>(sums.rows);
  TierEvaluation e;
  e.tier = sums.tier;
  e.perplexity = std::exp(sums.negative_log_likelihood / rows);
  e.top1_agreement = static_cast<double>(sums.agreements) / rows;
  e.kl_nats = sums.kl_nats / rows;
  e.weight_bytes_per_token = BytesPerToken(sums);
  LayerSums all;
  double byte_shares = 0.0;
  bool any_predicted = false;
  for (int32_t l = 0; l < config_.layers; ++l) {
    const bool predicted = runner_.predictor().HasNeuronPoint(l, sums.tier);
    ReadFigures& layer = e.layers.emplace_back(Figures(sums.layers[l], sums, 1.0, predicted));
    layer.mlp_byte_share = MlpByteShare(sums, l);
    all += sums.layers[l];
    byte_shares += layer.mlp_byte_share;
    any_predicted = any_predicted || predicted;
  }
  e.mean = Figures(all, sums, config_.layers, any_predicted);
  e.mean.mlp_byte_share = byte_shares / config_.layers;
  return e;
}

double Evaluator::MlpByteShare(const TierSums& sums, int32_t l) const {
  const LayerSums& layer = sums.layers[l];
  const LayerBytes of(runner_.weights().layers[l], config_);
  int64_t bytes = layer.up_rows * of.up_row + layer.down_rows * of.down_row + sums.reads * of.down_bias;
  if (predictor_ != nullptr) {
    bytes += sums.reads * NeuronPredictorBytes(predictor_->layers[l].neurons, sums.tier, config_.hidden, config_.ffn);
  }
  return static_cast<double>(bytes) / static_cast<double>(sums.reads * of.mlp);
}

double Evaluator::BytesPerToken(const TierSums& sums) const {
  const OptWeights& weights = runner_.weights();
  const auto reads = static_cast<double>(sums.reads), rows = static_cast<double>(sums.rows);
  double bytes =
      reads * static_cast<double>(BytesAfterLayers(weights)) + rows * static_cast<double>(EmbeddingBytes(weights));
  for (int32_t l = 0; l < config_.layers; ++l) {
    const LayerBytes of(weights.layers[l], config_);
    bytes += MlpByteShare(sums, l) * reads * static_cast<double>(of.mlp);
    bytes += static_cast<double>(sums.layers[l].heads * of.head + sums.reads * of.rest);
    if (predictor_ == nullptr) continue;
    const SelectorData& heads = predictor_->layers[l].heads;
    bytes += reads * static_cast<double>(HeadPredictorBytes(heads, sums.tier, config_.hidden, config_.heads));
  }
  return bytes / rows;
}

}  // namespace

absl::StatusOr<Evaluation> Evaluate(ModelRunner& runner, const PredictorData* predictor,
                                    absl::Span<const int32_t> tokens, const EvaluationOptions& options,
                                    const EvaluationProgress& progress) {
  return Evaluator(runner, predictor, tokens, options, progress).Run();
}

}  // namespace dejavu
