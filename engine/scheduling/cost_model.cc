#include "engine/scheduling/cost_model.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dejavu {
namespace {

constexpr double kForgetting = 0.998;  // about the last 500 steps count
constexpr double kStartVariance = 1e4;
// Rows and tokens in units in which a coefficient is of the size of the others.
constexpr double kPrefillUnit = 16.0, kContextUnit = 1024.0;
// Far off is a step that took this share of its prediction less, or more and so many usual errors beyond that. It moves
// the fit no more than one that is just not far off.
constexpr double kOutlier = 5.0, kOutlierShare = 0.5;
constexpr double kLeastMs = 1e-6;  // of a prediction that something is divided by

size_t BaseOf(Tier tier) { return tier == Tier::kDense ? 0 : tier == Tier::kExact ? 1 : 2; }
// Drafts may have weights of their own, and are of predicted tiers alone.
size_t BaseOf(const StepShape& shape) { return shape.drafts ? 3 : BaseOf(shape.tier); }

}  // namespace

CostModel::CostModel() { Restart(); }

CostModel::CostModel(const CostParameters& known) : CostModel() {
  weights_ = {known.dense_ms,
              known.exact_ms,
              known.predicted_ms,
              known.draft_ms > 0.0 ? known.draft_ms : known.predicted_ms,
              known.row_ms,
              known.prefill_token_ms * kPrefillUnit,
              known.context_token_ms * kContextUnit,
              known.check_row_ms};
  steps_ = kLearned;
  seen_.fill(1);
}

CostModel::Vector CostModel::Features(const StepShape& s) {
  Vector x = {};
  x[BaseOf(s)] = 1.0;
  x[kBases] = s.decode_rows;
  x[kBases + 1] = s.prefill_rows / kPrefillUnit;
  x[kBases + 2] = static_cast<double>(s.context_tokens) / kContextUnit;
  x[kBases + 3] = s.check_rows;
  return x;
}

void CostModel::Restart() {
  far_off_ = 0;
  error_ms_ = 0.0;
  covariance_ = {};
  for (int i = 0; i < kFeatures; ++i) covariance_[i][i] = kStartVariance;
}

bool CostModel::has_run(Tier tier) const { return seen_[BaseOf(tier)] > 0; }

void CostModel::Observe(const StepShape& shape, double ms) {
  const size_t base = BaseOf(shape);
  RecentSteps& recent = recent_[base][shape.prefill_rows > 0];
  recent.steps[recent.count++ % kRecent] = {shape, ms};
  if (seen_[base] == 0) weights_[base] = DearestBase();
  ++seen_[base];
  ++steps_;
  const double predicted_ms = Predict(shape);
  double error = ms - predicted_ms;
  if (steps_ <= kLearned) return Fit(shape, error);
  const double fast = kOutlierShare * predicted_ms, slow = fast + kOutlier * error_ms_;
  if (-fast <= error && error <= slow) {
    far_off_ = 0;
  } else {
    far_off_ = error > 0.0 ? std::max(far_off_, 0) + 1 : std::min(far_off_, 0) - 1;
    late_[std::abs(far_off_) - 1] = {shape, ms};
    if (std::abs(far_off_) == kNewLevel) {
      BeginAnew();
      return;
    }
    error = std::clamp(error, -fast, slow);
  }
  // By little where it is far off, or those would make the next of them usual.
  error_ms_ += 0.02 * (std::min(std::abs(error), 2.0 * error_ms_ + 0.2 * fast) - error_ms_);
  Fit(shape, error);
}

// From the last steps, which were all far off. Where they were slow, the least of them says how slow steps are now.
void CostModel::BeginAnew() {
  constexpr double kAlike = 4.0;
  double least = std::numeric_limits<double>::infinity();
  for (const Step& step : late_) least = std::min(least, step.ms / std::max(kLeastMs, Predict(step.shape)));
  for (Step& step : late_) step.ms = std::min(step.ms, kAlike * least * std::max(kLeastMs, Predict(step.shape)));
  Restart();
  for (const Step& step : late_) Fit(step.shape, step.ms - Predict(step.shape));
}

// `error` is how much longer the step took than it was fitted to.
void CostModel::Fit(const StepShape& shape, double error) {
  const Vector x = Features(shape);
  Vector px = {};
  double xpx = 0.0;
  for (int i = 0; i < kFeatures; ++i) {
    for (int j = 0; j < kFeatures; ++j) px[i] += covariance_[i][j] * x[j];
    xpx += x[i] * px[i];
  }
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
  ProjectOntoCosts();
}

// Nothing costs less than nothing. A weight below zero becomes zero, and the others become what fits best with it
// there: among steps that are nearly alike noise makes a base of seconds and a row of minus a tenth of that, and
// without its rows that base would be all that is predicted. An active set (Lawson and Hanson, Solving Least Squares
// Problems, 23) that only grows.
void CostModel::ProjectOntoCosts() {
  auto rest = covariance_;  // of the weights that are not held at zero
  for (int held = 0; held < kFeatures; ++held) {
    const auto least = std::min_element(weights_.begin(), weights_.end()) - weights_.begin();
    const double weight = weights_[least], variance = rest[least][least];
    if (weight >= 0.0) return;
    const Vector along = rest[least];
    for (int i = 0; i < kFeatures; ++i) {
      if (variance > 0.0) weights_[i] -= along[i] / variance * weight;
      for (int j = 0; variance > 0.0 && j < kFeatures; ++j) rest[i][j] -= along[i] * along[j] / variance;
    }
    weights_[least] = 0.0;
  }
  for (double& weight : weights_) weight = std::max(0.0, weight);
}

double CostModel::Predict(const StepShape& s) const {
  const CostParameters p = parameters();
  const double base = std::array{p.dense_ms, p.exact_ms, p.predicted_ms, p.draft_ms}[BaseOf(s)];
  return base + p.row_ms * s.decode_rows + p.check_row_ms * s.check_rows + p.prefill_token_ms * s.prefill_rows +
         p.context_token_ms * static_cast<double>(s.context_tokens);
}

double CostModel::best_share() const {
  double best = 1.0;
  for (const auto& of_base : recent_) {
    for (const RecentSteps& recent : of_base) {
      for (size_t i = 0; i < std::min(recent.count, kRecent); ++i) {
        const double predicted_ms = Predict(recent.steps[i].shape);
        if (predicted_ms > 0.0) best = std::min(best, recent.steps[i].ms / predicted_ms);
      }
    }
  }
  return best;
}

// A tier that no step has run yet costs what the dearest of the others does.
double CostModel::DearestBase() const {
  double dearest = 0.0;
  for (size_t i = 0; i < seen_.size(); ++i) dearest = std::max(dearest, seen_[i] > 0 ? weights_[i] : 0.0);
  return dearest;
}

CostParameters CostModel::parameters() const {
  const double dearest = DearestBase();
  const auto base = [&](int i) { return seen_[i] > 0 ? weights_[i] : dearest; };
  CostParameters p;
  p.dense_ms = base(0);
  p.exact_ms = base(1);
  p.predicted_ms = base(2);
  p.draft_ms = base(3);
  p.row_ms = weights_[kBases];
  p.prefill_token_ms = weights_[kBases + 1] / kPrefillUnit;
  p.context_token_ms = weights_[kBases + 2] / kContextUnit;
  p.check_row_ms = weights_[kBases + 3];
  return p;
}

}  // namespace dejavu
