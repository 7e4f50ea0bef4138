#include "server/api/sparsity_messages.h"

namespace dejavu {
namespace {

void FillShadow(const ShadowReport& report, v1::ShadowReport* message) {
  message->set_tokens(static_cast<uint32_t>(report.tokens));
  message->set_top1_agreement(report.top1_agreement);
  message->set_kl_nats(report.kl_nats);
  message->set_recall(report.recall);
  message->set_precision(report.precision);
  message->set_missed_mass(report.missed_mass);
}

void FillStats(const SparsityStats& stats, v1::SparsityInfo* message) {
  message->set_shadow_tokens(static_cast<uint64_t>(stats.shadow_tokens));
  if (stats.shadow_tokens > 0) {
    const auto tokens = static_cast<double>(stats.shadow_tokens);
    message->set_shadow_top1_agreement(static_cast<double>(stats.shadow_agreements) / tokens);
    message->set_shadow_kl_nats(stats.shadow_kl_nats / tokens);
  }
  for (const SparsityStats::Fallback& fallback : stats.exact_now) {
    v1::SparsityInfo::ExactLayer* layer = message->add_exact_layers();
    layer->set_tier(ToMessage(fallback.tier));
    layer->set_layer(static_cast<uint32_t>(fallback.layer));
  }
  int64_t fallbacks = 0, recoveries = 0;
  for (const LayerSparsityStats& layer : stats.layers) {
    fallbacks += layer.fallbacks;
    recoveries += layer.recoveries;
  }
  message->set_fallbacks(static_cast<uint64_t>(fallbacks));
  message->set_recoveries(static_cast<uint64_t>(recoveries));
}

}  // namespace

LayerShares SharesOf(const LayerSparsityStats& layer, const ModelShape& shape) {
  const auto share = [](auto part, double whole) { return whole > 0.0 ? static_cast<double>(part) / whole : 0.0; };
  const auto rows = static_cast<double>(layer.rows), steps = static_cast<double>(layer.steps);
  LayerShares shares;
  shares.mlp_density = share(layer.selected + layer.active, 2.0 * rows * shape.ffn);
  shares.head_density = share(layer.heads, rows * shape.heads);
  shares.union_density = share(layer.union_selected, steps * shape.ffn);
  shares.recall = share(layer.shadow_hits, static_cast<double>(layer.shadow_active));
  shares.precision = share(layer.shadow_hits, static_cast<double>(layer.shadow_selected));
  shares.missed_mass = share(layer.shadow_missed_mass, layer.shadow_mass);
  return shares;
}

v1::Tier ToMessage(Tier tier) {
  switch (tier) {
    case Tier::kDense:
      return v1::TIER_DENSE;
    case Tier::kExact:
      return v1::TIER_EXACT;
    case Tier::kHigh:
      return v1::TIER_HIGH;
    case Tier::kBalanced:
      return v1::TIER_BALANCED;
    case Tier::kFast:
      return v1::TIER_FAST;
  }
  return v1::TIER_UNSPECIFIED;
}

std::optional<Tier> FromMessage(v1::Tier message) {
  for (const Tier tier : kAllTiers) {
    if (ToMessage(tier) == message) return tier;
  }
  return std::nullopt;
}

bool IsAllowed(Tier tier, const ServerOptions& options) {
  return tier >= options.highest_tier && tier <= options.lowest_tier;  // less quality is the larger number
}

void FillReport(const SparsityReport& report, v1::SparsityReport* message) {
  message->set_tier(ToMessage(report.tier));
  message->set_decode_tokens(static_cast<uint32_t>(report.decode_tokens));
  message->set_mlp_density(report.mlp_density);
  message->set_mlp_selected(report.mlp_selected);
  message->set_mlp_active(report.mlp_active);
  message->set_mlp_union_density(report.mlp_union_density);
  message->set_head_density(report.head_density);
  message->set_fallback_share(report.fallback_share);
  if (report.shadow.tokens > 0) FillShadow(report.shadow, message->mutable_shadow());
}

void FillInfo(const ServerOptions& options, const Engine* engine, v1::SparsityInfo* message) {
  message->set_default_tier(ToMessage(options.default_tier));
  message->set_highest_tier(ToMessage(options.highest_tier));
  message->set_lowest_tier(ToMessage(options.lowest_tier));
  message->set_shadow_every(static_cast<uint32_t>(options.shadow_every));
  if (engine == nullptr) return;
  for (const Tier tier : kAllTiers) {
    if (IsAllowed(tier, options) && engine->CheckTier(tier).ok()) message->add_available_tiers(ToMessage(tier));
  }
  const PredictorInfo& predictor = engine->predictor();
  message->set_predictor(predictor.path);
  message->set_predictor_tap(predictor.tap);
  message->set_predictor_bytes(static_cast<uint64_t>(predictor.bytes));
  FillStats(engine->sparsity_stats(), message);
}

}  // namespace dejavu
