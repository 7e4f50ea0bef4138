// TierTuner: settles the tiers once all layers are fitted. The layers were fitted one by one; here they run together,
// and each tier is brought to the KL divergence that it may cost. One thread.
#ifndef ENGINE_CALIBRATION_TIER_TUNER_H_
#define ENGINE_CALIBRATION_TIER_TUNER_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/calibration/calibration_state.h"
#include "engine/calibration/window.h"
#include "engine/eval/evaluation.h"
#include "engine/model/predictor_data.h"
#include "engine/ranks/model_runner.h"
#include "engine/sparsity.h"

namespace dejavu {

inline constexpr std::array<Tier, 3> kCalibratedTiers = {Tier::kHigh, Tier::kBalanced, Tier::kFast};

// What is settled for a tier once the layers run together.
struct TierChoice {
  double shift = 0.0;  // added to the biases of its neurons
  bool heads = false;
  double bytes = 0.0;             // weights read per token
  double bytes_with_heads = 0.0;  // and what skipping heads at the same quality would make of them; 0: not tried
};

class TierTuner {
 public:
  // `windows`: of text that nothing was fitted to. `kl_targets`: nats per token, one for each of kCalibratedTiers. All
  // outlive it.
  TierTuner(ModelRunner& runner, const CalibrationState& state, Tap tap, const std::vector<Window>& windows,
            const std::vector<double>& kl_targets, StepProgress progress);

  // One for each of kCalibratedTiers.
  absl::StatusOr<std::vector<TierChoice>> Choose();
  PredictorData Assemble(const std::vector<TierChoice>& choices) const;
  // Of all tiers of `data` on all of the text.
  absl::StatusOr<Evaluation> MeasureAll(const PredictorData& data) { return Measure(data, data.tiers, tokens_); }

 private:
  absl::Status MeetTargets(std::vector<TierChoice>* choices);
  absl::Status TryHeads(std::vector<TierChoice>* choices);
  absl::StatusOr<Evaluation> Measure(const PredictorData& data, const std::vector<Tier>& tiers,
                                     const std::vector<int32_t>& tokens);

  ModelRunner& runner_;
  const CalibrationState& state_;
  const Tap tap_;
  const std::vector<double>& kl_targets_;
  const StepProgress progress_;
  std::vector<int32_t> tokens_, some_tokens_;  // of all windows, and of every second one
};

}  // namespace dejavu

#endif  // ENGINE_CALIBRATION_TIER_TUNER_H_
