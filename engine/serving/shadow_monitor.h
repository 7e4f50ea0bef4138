// ShadowMonitor: decides from shadow checks which layers a tier may still skip in. A layer whose missed mass stays
// above its limit goes EXACT for that tier until it has stayed well below for a while. Pure arithmetic: no device, no
// clock. Engine thread only.
#ifndef ENGINE_SERVING_SHADOW_MONITOR_H_
#define ENGINE_SERVING_SHADOW_MONITOR_H_

#include <cstdint>
#include <vector>

#include "engine/model/predictor_file.h"
#include "engine/sparsity.h"

namespace dejavu {

class ShadowMonitor {
 public:
  enum class Change { kNone, kFallBack, kRecover };

  // The limits follow from what calibration measured (OperatingPoint::missed_share). nullptr: nothing is watched.
  ShadowMonitor(const PredictorData* data, int32_t layers);

  // One shadow token of `tier`: the mass of `layer` and what of it the prediction missed. Says what is to change now.
  Change Observe(Tier tier, int32_t layer, double mass, double missed_mass);

  bool fallen_back(Tier tier, int32_t layer) const { return at(tier, layer).fallen_back; }
  // The share of missed mass above which a layer falls back.
  double limit(Tier tier, int32_t layer) const { return at(tier, layer).limit; }

 private:
  // Means over about the last kWindow tokens, the missed share of each token counted the same: a few tokens carry
  // activations a hundred times larger than the rest. A layer comes back after kRecoveryWindow of them: where most of
  // the mass lies in few tokens, the others look well even if the predictor is broken.
  static constexpr int32_t kWindow = 64;
  static constexpr int32_t kLeastTokens = 32;
  static constexpr int32_t kRecoveryWindow = 256;

  struct State {
    double limit = 1.0;
    double missed_share = 0.0;
    int64_t tokens = 0;  // since the last change
    bool fallen_back = false;
  };
  const State& at(Tier tier, int32_t layer) const {
    return states_[static_cast<size_t>(layer) * kAllTiers.size() + static_cast<size_t>(tier)];
  }

  std::vector<State> states_;  // [layers, tiers]
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_SHADOW_MONITOR_H_
