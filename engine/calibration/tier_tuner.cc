#include "engine/calibration/tier_tuner.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/calibration/quantise.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int kShiftRounds = 4;
constexpr double kLargestShift = 2.0;
constexpr double kCloseEnough = 0.08;
// Choosing heads takes two more operations a layer, which a saving must pay for.
constexpr double kLeastHeadSaving = 0.03;

size_t IndexOf(Tier tier) {
  return static_cast<size_t>(std::find(kCalibratedTiers.begin(), kCalibratedTiers.end(), tier) -
                             kCalibratedTiers.begin());
}

}  // namespace

TierTuner::TierTuner(ModelRunner& runner, const CalibrationState& state, Tap tap, const std::vector<Window>& windows,
                     const std::vector<double>& kl_targets, StepProgress progress)
    : runner_(runner), state_(state), tap_(tap), kl_targets_(kl_targets), progress_(std::move(progress)) {
  for (size_t i = 0; i < windows.size(); ++i) {
    const Window w = windows[i];
    tokens_.insert(tokens_.end(), w.begin(), w.end());
    if (i % 2 == 0) some_tokens_.insert(some_tokens_.end(), w.begin(), w.end());
  }
}

absl::StatusOr<std::vector<TierChoice>> TierTuner::Choose() {
  std::vector<TierChoice> choices(kCalibratedTiers.size());
  RETURN_IF_ERROR(MeetTargets(&choices));
  RETURN_IF_ERROR(TryHeads(&choices));
  return choices;
}

PredictorData TierTuner::Assemble(const std::vector<TierChoice>& choices) const {
  PredictorData data;
  data.weights_hash = runner_.weights_hash();
  data.tap = tap_;
  data.tiers.assign(kCalibratedTiers.begin(), kCalibratedTiers.end());
  data.layers = state_.facts;
  std::vector<double> shifts;
  for (const TierChoice& choice : choices) shifts.push_back(choice.shift);
  for (int32_t l = 0; l < runner_.config().layers; ++l) {
    data.layers[l].neurons = Quantise(state_.fits[l].neurons, shifts, data.tiers);
    FloatSelector heads = state_.fits[l].heads;
    bool any = false;
    for (size_t i = 0; i < heads.points.size(); ++i) {
      if (!choices[i].heads) heads.points[i].rank = 0;
      any = any || heads.points[i].rank > 0;
    }
    if (any) data.layers[l].heads = Quantise(heads, std::vector<double>(choices.size(), 0.0), data.tiers);
  }
  data.report_json = "{}";
  return data;
}

absl::StatusOr<Evaluation> TierTuner::Measure(const PredictorData& data, const std::vector<Tier>& tiers,
                                              const std::vector<int32_t>& tokens) {
  EvaluationOptions options;
  options.tiers = tiers;
  return Evaluate(runner_, &data, tokens, options, nullptr);
}

// A shift of all biases of a tier trades nats for bytes as a larger or smaller mu would: d log(mu) = d bias, and nats
// fall about in proportion to mu.
absl::Status TierTuner::MeetTargets(std::vector<TierChoice>* choices) {
  std::vector<Tier> open(kCalibratedTiers.begin(), kCalibratedTiers.end());
  for (int round = 0; round < kShiftRounds && !open.empty(); ++round) {
    if (!progress_(static_cast<double>(round) / kShiftRounds)) return CalibrationStopped();
    ASSIGN_OR_RETURN(const Evaluation evaluation, Measure(Assemble(*choices), open, some_tokens_));
    open.clear();
    for (const TierEvaluation& tier : evaluation.tiers) {
      if (!IsPredicted(tier.tier)) continue;
      const size_t i = IndexOf(tier.tier);
      TierChoice& choice = (*choices)[i];
      choice.bytes = tier.weight_bytes_per_token;
      const double off = std::log(std::max(tier.kl_nats, 1e-9) / kl_targets_[i]);
      if (std::fabs(off) < kCloseEnough) continue;
      choice.shift = std::clamp(choice.shift + off, -kLargestShift, kLargestShift);
      open.push_back(tier.tier);
    }
  }
  return absl::OkStatus();
}

// Skipping heads costs nats, which the neurons must make good with bytes of their own. Where that leaves a tier with
// clearly fewer bytes at the same quality, it skips heads.
absl::Status TierTuner::TryHeads(std::vector<TierChoice>* choices) {
  const bool possible =
      std::any_of(state_.fits.begin(), state_.fits.end(), [](const LayerFit& fit) { return !fit.heads.a.empty(); });
  if (!possible) return absl::OkStatus();
  std::vector<TierChoice> with = *choices;
  for (TierChoice& choice : with) choice.heads = true;
  RETURN_IF_ERROR(MeetTargets(&with));
  for (size_t i = 0; i < with.size(); ++i) {
    (*choices)[i].bytes_with_heads = with[i].bytes;
    if (with[i].bytes < (1.0 - kLeastHeadSaving) * (*choices)[i].bytes) (*choices)[i] = with[i];
  }
  return absl::OkStatus();
}

}  // namespace dejavu
