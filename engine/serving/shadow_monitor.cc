#include "engine/serving/shadow_monitor.h"

#include <algorithm>

namespace dejavu {
namespace {

// Text differs from what was calibrated on; a broken predictor misses most of the mass.
constexpr double kTolerance = 4.0;
constexpr double kSlack = 0.08;
constexpr double kHighestLimit = 0.6;
constexpr double kRecoverShare = 0.5;  // of the limit

}  // namespace

ShadowMonitor::ShadowMonitor(const PredictorData* data, int32_t layers)
    : states_(static_cast<size_t>(layers) * kAllTiers.size()) {
  if (data == nullptr) return;
  for (int32_t l = 0; l < layers; ++l) {
    for (size_t tier = 0; tier < kAllTiers.size(); ++tier) {
      const auto& point = data->layers[l].neurons.points[tier];
      if (!point.has_value()) continue;
      states_[l * kAllTiers.size() + tier].limit = std::min(kHighestLimit, kTolerance * point->missed_share + kSlack);
    }
  }
}

ShadowMonitor::Change ShadowMonitor::Observe(Tier tier, int32_t layer, double mass, double missed_mass) {
  State& state = states_[static_cast<size_t>(layer) * kAllTiers.size() + static_cast<size_t>(tier)];
  if (!(mass > 0.0)) return Change::kNone;
  ++state.tokens;
  const int64_t window = state.fallen_back ? kRecoveryWindow : kWindow;
  const double weight = 1.0 / static_cast<double>(std::min(state.tokens, window));
  state.missed_share += weight * (missed_mass / mass - state.missed_share);
  if (state.tokens < (state.fallen_back ? kRecoveryWindow : kLeastTokens)) return Change::kNone;
  const bool fall_back = !state.fallen_back && state.missed_share > state.limit;
  const bool recover = state.fallen_back && state.missed_share < kRecoverShare * state.limit;
  if (!fall_back && !recover) return Change::kNone;
  state.fallen_back = fall_back;
  state.tokens = 0;
  return fall_back ? Change::kFallBack : Change::kRecover;
}

}  // namespace dejavu
