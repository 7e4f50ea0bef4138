#include "engine/scheduling/cost_model.h"

#include <algorithm>
#include <cmath>

namespace dejavu {
namespace {

constexpr double kForgetting = 0.998;  // about the last 500 steps count
constexpr double kStartVariance = 1e4;
// Rows and tokens in units in which a coefficient is of the size of the others.
constexpr double kPrefillUnit = 16.0, kContextUnit = 1024.0;
// A step far off, such as one that the system interrupted, moves the fit no more than one off by so many usual errors,
// or by this share of the prediction.
constexpr double kOutlier = 5.0, kOutlierShare = 0.5;

}  // namespace

CostModel::CostModel() {
  for (int i = 0; i < kFeatures; ++i) covariance_[i][i] = kStartVariance;
}

CostModel::CostModel(const CostParameters& known) : CostModel() {
  weights_ = {known.dense_ms,
              known.exact_ms,
              known.predicted_ms,
              known.row_ms,
              known.prefill_token_ms * kPrefillUnit,
              known.context_token_ms * kContextUnit};
  steps_ = kLearned;
  seen_ = {1, 1, 1};
}

CostModel::Vector CostModel::Features(const StepShape& s) {
  return {s.tier == Tier::kDense ? 1.0 : 0.0, s.tier == Tier::kExact ? 1.0 : 0.0,
          IsPredicted(s.tier) ? 1.0 : 0.0,    static_cast<double>(s.decode_rows),
          s.prefill_rows / kPrefillUnit,      static_cast<double>(s.context_tokens) / kContextUnit};
}

void CostModel::Observe(const StepShape& shape, double ms) {
  const Vector x = Features(shape);
  Vector px = {};
  double xpx = 0.0, error = ms;
  for (int i = 0; i < kFeatures; ++i) {
    for (int j = 0; j < kFeatures; ++j) px[i] += covariance_[i][j] * x[j];
    xpx += x[i] * px[i];
    error -= weights_[i] * x[i];
  }
  for (size_t i = 0; i < seen_.size(); ++i) seen_[i] += x[i] > 0.0;
  const double most = kOutlier * error_ms_ + kOutlierShare * (ms - error);
  if (learned()) error = std::clamp(error, -std::max(0.0, most), std::max({0.0, most, kOutlierShare * ms}));
  error_ms_ += (std::abs(error) - error_ms_) * std::max(0.02, 1.0 / static_cast<double>(steps_ + 1));
  ++steps_;
  const double gain = 1.0 / (kForgetting + xpx);
  for (int i = 0; i < kFeatures; ++i) weights_[i] += px[i] * gain * error;
  for (int i = 0; i < kFeatures; ++i) {
    for (int j = 0; j < kFeatures; ++j) {
      covariance_[i][j] = (covariance_[i][j] - px[i] * px[j] * gain) / kForgetting;
    }
  }
  // A direction that no step has shown for long would grow without bound.
  for (int i = 0; i < kFeatures; ++i) {
    if (covariance_[i][i] <= kStartVariance) continue;
    const double shrink = std::sqrt(kStartVariance / covariance_[i][i]);
    for (int j = 0; j < kFeatures; ++j) {
      covariance_[i][j] *= shrink;
      covariance_[j][i] *= shrink;
    }
  }
}

double CostModel::Predict(const StepShape& s) const {
  const CostParameters p = parameters();
  const double base = s.tier == Tier::kDense ? p.dense_ms : s.tier == Tier::kExact ? p.exact_ms : p.predicted_ms;
  return base + p.row_ms * s.decode_rows + p.prefill_token_ms * s.prefill_rows +
         p.context_token_ms * static_cast<double>(s.context_tokens);
}

// A tier that no step has run yet costs what the dearest of the others does.
CostParameters CostModel::parameters() const {
  const auto at = [&](int i) { return std::max(0.0, weights_[i]); };
  double dearest = 0.0;
  for (int i = 0; i < 3; ++i) dearest = std::max(dearest, seen_[i] > 0 ? at(i) : 0.0);
  const auto base = [&](int i) { return seen_[i] > 0 ? at(i) : dearest; };
  return {base(0), base(1), base(2), at(3), at(4) / kPrefillUnit, at(5) / kContextUnit};
}

}  // namespace dejavu
