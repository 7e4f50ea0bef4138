#include "engine/serving/sparsity_control.h"

#include <algorithm>

#include "engine/serving/compare_logits.h"
#include "kernels/draw.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

double Ratio(double part, double whole) { return whole > 0.0 ? part / whole : 0.0; }

}  // namespace

SparsityControl::SparsityControl(const OptConfig& config, const PredictorData* data, const OptWeights& weights,
                                 const DraftWeights* drafts, Predictor& predictor, bool fall_back,
                                 EngineMetrics& metrics)
    : config_(config),
      predictor_(predictor),
      metrics_(metrics),
      reads_(ReadsOf(weights, config)),
      draft_reads_(drafts == nullptr ? reads_ : ReadsOf(drafts->weights(), config)),
      fall_back_(fall_back),
      monitor_(data, config.layers),
      layers_(config.layers),
      published_layers_(config.layers) {}

SparsityControl::Reads SparsityControl::ReadsOf(const OptWeights& weights, const ModelShape& shape) {
  return {LayerBytes(weights.layers.front(), shape), BytesAfterLayers(weights), EmbeddingBytes(weights)};
}

// Requests take turns, so that short ones are looked at too.
bool SparsityControl::WantsShadow(const Sequence& s, const StepShare& share) {
  const SparsityParams& wanted = s.request.sparsity;
  return share.step_rows > 0 && s.decodes() && IsPredicted(wanted.tier) && wanted.shadow_every > 0 &&
         (static_cast<uint64_t>(share.step_after) + s.id) % static_cast<uint64_t>(wanted.shadow_every) == 0;
}

bool SparsityControl::ShadowFollows(const std::vector<std::unique_ptr<Sequence>>& running) const {
  return std::any_of(running.begin(), running.end(), [](const auto& s) { return WantsShadow(*s, s->ahead); });
}

void SparsityControl::PlanShadow(const std::vector<std::unique_ptr<Sequence>>& running, Batch& batch,
                                 Batch& shadow) const {
  shadow.Clear();
  for (const auto& s : running) {
    if (!WantsShadow(*s, *s)) continue;
    if (static_cast<int32_t>(batch.audit_rows.size()) == predictor_.max_audits()) break;
    batch.audit_rows.push_back(s->first_row);
    shadow.AddRow(s->slot, batch.positions[s->first_row], batch.tokens[s->first_row], /*wants_logits=*/true,
                  Tier::kDense);
  }
  if (shadow.rows() > 0) shadow.block_table = batch.block_table;
}

void SparsityControl::NoteStep(const std::vector<std::unique_ptr<Sequence>>& running, const Batch& batch,
                               const StepCounts& counts, const float* logits, const float* shadow_logits) {
  const bool count = metrics_.counting.load(std::memory_order_relaxed);
  if (count) NoteBytes(batch, counts);
  if (batch.decode_rows == 0) return;
  if (count) NoteUnion(batch, counts);
  if (counts.ranks > 1) {
    ++totals_.group_steps;
    totals_.imbalance += counts.imbalance;
    metrics_.imbalance.Observe(counts.imbalance);
  }
  // All rows first: what the audits then switch holds from the next step on.
  for (const auto& s : running) {
    if (s->step_rows == 0 || !s->decodes()) continue;
    for (int32_t i = 0; i < s->kept_rows; ++i) NoteRow(*s, s->first_row + i, batch, counts);
  }
  int32_t audit = 0;
  const int32_t audits = static_cast<int32_t>(batch.audit_rows.size());
  for (const auto& s : running) {
    if (s->step_rows == 0 || audit == audits || batch.audit_rows[audit] != s->first_row) continue;
    NoteShadow(*s, audit, counts, logits + static_cast<size_t>(s->first_logit) * config_.vocab,
               shadow_logits + static_cast<size_t>(audit) * config_.vocab);
    ++audit;
  }
  for (int32_t l = 0; l < config_.layers; ++l) {
    if (counts.union_selected[l] == config_.ffn) continue;
    ++layers_[l].steps;
    layers_[l].union_selected += counts.union_selected[l];
    layers_[l].union_active += counts.active_of(l, batch.decode_rows);
  }
  const auto first_tier = batch.tiers.begin();
  if (counts.ranks > 1 || std::any_of(first_tier, first_tier + batch.decode_rows, IsPredicted)) Publish();
}

void SparsityControl::Publish() {
  for (size_t l = 0; l < layers_.size(); ++l) published_layers_[l].Store(layers_[l]);
  published_totals_.Store(totals_);
}

// `sparse` and `dense` are the two rows of logits, [vocab].
void SparsityControl::NoteShadow(Sequence& s, int32_t audit, const StepCounts& counts, const float* sparse,
                                 const float* dense) {
  if (!AllFinite(sparse, config_.vocab) || !AllFinite(dense, config_.vocab)) return;
  const LogitsComparison comparison = CompareLogits(dense, sparse, config_.vocab);
  ++s.sparsity.shadow_tokens;
  s.sparsity.shadow_agreements += comparison.same_top;
  s.sparsity.shadow_kl_nats += comparison.kl_nats;
  ++totals_.shadow_tokens;
  totals_.shadow_agreements += comparison.same_top;
  totals_.shadow_kl_nats += comparison.kl_nats;
  const auto tier = static_cast<size_t>(s.request.sparsity.tier);
  metrics_.shadow_tokens[tier].Add(1);
  metrics_.shadow_disagreements[tier].Add(!comparison.same_top);
  metrics_.shadow_kl[tier].Observe(comparison.kl_nats);
  NoteAudit(s, audit, counts);
}

// What of each quarter of the layers the step read, and how much more that was than what its rows wanted.
void SparsityControl::NoteUnion(const Batch& batch, const StepCounts& counts) {
  double of_all = 0.0, of_rows = 0.0;
  for (int group = 0; group < kLayerGroups; ++group) {
    const int32_t first = config_.layers * group / kLayerGroups, end = config_.layers * (group + 1) / kLayerGroups;
    if (first == end) continue;
    int64_t neurons = 0, heads = 0;
    for (int32_t l = first; l < end; ++l) {
      neurons += counts.union_selected[l] + counts.union_down_of(l);
      heads += counts.union_heads[l];
      of_all += counts.union_selected[l];
      for (int32_t r = 0; r < batch.decode_rows; ++r) of_rows += counts.selected_of(l, r);
    }
    const double layers = end - first;
    metrics_.union_mlp_density[group].Observe(static_cast<double>(neurons) / (2.0 * layers * config_.ffn));
    metrics_.union_head_density[group].Observe(static_cast<double>(heads) / (layers * config_.heads));
  }
  size_t size = 0;
  while (size + 1 < kBatchSizes.size() && kBatchSizes[size] < batch.decode_rows) ++size;
  if (of_rows > 0.0) metrics_.union_inflation[size].Observe(of_all * batch.decode_rows / of_rows);
}

// Of a group, rank 0's shapes stand for all ranks'. Where no row decodes everything is read.
void SparsityControl::NoteBytes(const Batch& batch, const StepCounts& counts) {
  const int64_t ranks = counts.ranks, layers = config_.layers;
  const Reads& reads = batch.drafts ? draft_reads_ : reads_;
  const LayerBytes& of = reads.layer;
  const int64_t dense_mlp = config_.ffn * (of.up_row + of.down_row) + of.down_bias;
  const int64_t dense_attention = of.rest * ranks + config_.heads * of.head;
  int64_t mlp = layers * dense_mlp, attention = layers * dense_attention;
  if (batch.decode_rows > 0) {
    mlp = attention = 0;
    for (int32_t l = 0; l < config_.layers; ++l) {
      mlp += counts.union_selected[l] * of.up_row + counts.union_down_of(l) * of.down_row + of.down_bias;
      attention += of.rest * ranks + counts.union_heads[l] * of.head;
    }
    metrics_.weight_bytes_saved.Add(layers * (dense_mlp + dense_attention) - mlp - attention);
  }
  const int64_t predictor = predictor_.step_bytes() * ranks, embedding = batch.rows() * reads.embedding;
  const int64_t head = batch.logit_rows.empty() ? 0 : reads.head * ranks;
  metrics_.weight_bytes_read[kMlpWeights].Add(mlp);
  metrics_.weight_bytes_read[kAttentionWeights].Add(attention);
  metrics_.weight_bytes_read[kPredictorWeights].Add(predictor);
  metrics_.weight_bytes_read[kEmbeddingWeights].Add(embedding);
  metrics_.weight_bytes_read[kHeadWeights].Add(head);
  step_bytes_ = batch.decode_rows > 0 ? mlp + attention + predictor + embedding + head : 0;
}

void SparsityControl::NoteRow(Sequence& s, int32_t row, const Batch& batch, const StepCounts& counts) {
  const Tier tier = batch.tiers[row];
  SparsitySums& sums = s.sparsity;
  ++sums.tokens;
  for (int32_t l = 0; l < config_.layers; ++l) {
    const int32_t selected = counts.selected_of(l, row), heads = counts.heads_of(l, row);
    const int32_t active = tier == Tier::kDense ? config_.ffn : counts.active_of(l, row);
    sums.selected += selected;
    sums.active += active;
    sums.heads += heads;
    sums.union_rows += counts.union_selected[l] + counts.union_down_of(l);
    if (!IsPredicted(tier)) continue;
    sums.fallback_layers += monitor_.fallen_back(tier, l);
    LayerSparsityStats& layer = layers_[l];
    ++layer.rows;
    layer.selected += selected;
    layer.active += active;
    layer.heads += heads;
  }
}

void SparsityControl::NoteAudit(Sequence& s, int32_t audit, const StepCounts& counts) {
  struct {
    double selected = 0, active = 0, hits = 0, mass = 0, missed = 0;
  } groups[kLayerGroups];
  const Tier tier = s.request.sparsity.tier;
  SparsitySums& sums = s.sparsity;
  for (int32_t l = 0; l < config_.layers; ++l) {
    if (!predictor_.HasNeuronPoint(l, tier)) continue;
    const float* const found = counts.audit_of(l, audit);
    sums.shadow_selected += found[kAuditSelected];
    sums.shadow_active += found[kAuditActive];
    sums.shadow_hits += found[kAuditHits];
    sums.shadow_mass += found[kAuditMass];
    sums.shadow_missed_mass += found[kAuditMissedMass];
    LayerSparsityStats& layer = layers_[l];
    ++layer.shadow_rows;
    layer.shadow_selected += static_cast<int64_t>(found[kAuditSelected]);
    layer.shadow_active += static_cast<int64_t>(found[kAuditActive]);
    layer.shadow_hits += static_cast<int64_t>(found[kAuditHits]);
    layer.shadow_mass += found[kAuditMass];
    layer.shadow_missed_mass += found[kAuditMissedMass];
    auto& group = groups[l * kLayerGroups / config_.layers];
    group.selected += found[kAuditSelected];
    group.active += found[kAuditActive];
    group.hits += found[kAuditHits];
    group.mass += found[kAuditMass];
    group.missed += found[kAuditMissedMass];
    if (!fall_back_) continue;
    Change(monitor_.Observe(tier, l, found[kAuditMass], found[kAuditMissedMass]), tier, l);
  }
  for (int i = 0; i < kLayerGroups; ++i) {
    if (groups[i].active == 0.0) continue;
    metrics_.recall[i].Observe(groups[i].hits / groups[i].active);
    metrics_.precision[i].Observe(Ratio(groups[i].hits, groups[i].selected));
    metrics_.missed_mass[i].Observe(Ratio(groups[i].missed, groups[i].mass));
  }
}

void SparsityControl::Change(ShadowMonitor::Change change, Tier tier, int32_t l) {
  if (change == ShadowMonitor::Change::kNone) return;
  const bool falls_back = change == ShadowMonitor::Change::kFallBack;
  predictor_.SwitchNeurons(l, tier, !falls_back);
  LayerSparsityStats& layer = layers_[l];
  const uint32_t bit = 1u << static_cast<uint32_t>(tier);
  if (falls_back) {
    ++layer.fallbacks;
    layer.exact_tiers |= bit;
    spdlog::warn("tier {}, layer {}: shadow checks miss more than {:.1f} % of the mass; it runs exact until they pass",
                 std::string(Name(tier)), l, 100.0 * monitor_.limit(tier, l));
  } else {
    ++layer.recoveries;
    layer.exact_tiers &= ~bit;
    spdlog::info("tier {}, layer {}: shadow checks pass again; it is predicted", std::string(Name(tier)), l);
  }
}

void SparsityControl::Reset(const PredictorData& data) {
  monitor_ = ShadowMonitor(&data, config_.layers);
  for (LayerSparsityStats& layer : layers_) layer.exact_tiers = 0;
  Publish();
}

SparsityReport SparsityControl::Report(const Sequence& s) const {
  const SparsitySums& sums = s.sparsity;
  SparsityReport report;
  report.tier = s.request.sparsity.tier;
  report.decode_tokens = sums.tokens;
  if (sums.tokens > 0) {
    const double passes = static_cast<double>(sums.tokens) * config_.layers;
    const double neurons = passes * config_.ffn;
    report.mlp_selected = static_cast<double>(sums.selected) / neurons;
    report.mlp_active = static_cast<double>(sums.active) / neurons;
    report.mlp_density = (report.mlp_selected + report.mlp_active) / 2.0;
    report.mlp_union_density = static_cast<double>(sums.union_rows) / neurons / 2.0;
    report.head_density = static_cast<double>(sums.heads) / (passes * config_.heads);
    report.fallback_share = static_cast<double>(sums.fallback_layers) / passes;
  }
  ShadowReport& shadow = report.shadow;
  shadow.tokens = sums.shadow_tokens;
  shadow.top1_agreement = Ratio(static_cast<double>(sums.shadow_agreements), static_cast<double>(sums.shadow_tokens));
  shadow.kl_nats = Ratio(sums.shadow_kl_nats, static_cast<double>(sums.shadow_tokens));
  shadow.recall = Ratio(sums.shadow_hits, sums.shadow_active);
  shadow.precision = Ratio(sums.shadow_hits, sums.shadow_selected);
  shadow.missed_mass = Ratio(sums.shadow_missed_mass, sums.shadow_mass);
  return report;
}

SparsityStats SparsityControl::stats() const {
  SparsityStats stats;
  static_cast<SparsityTotals&>(stats) = published_totals_.Load();
  for (const SeqLock<LayerSparsityStats>& published : published_layers_) {
    const auto l = static_cast<int32_t>(stats.layers.size());
    const LayerSparsityStats& layer = stats.layers.emplace_back(published.Load());
    for (const Tier tier : kAllTiers) {
      if ((layer.exact_tiers >> static_cast<uint32_t>(tier) & 1) != 0) stats.exact_now.push_back({tier, l});
    }
  }
  return stats;
}

}  // namespace dejavu
