#include "engine/calibration/head_fit.h"

#include <algorithm>
#include <cmath>

namespace dejavu {

HeadFit::HeadFit(Backend& backend, const LayerProblem& problem, const LayerSample& sample, const FitOptions& options,
                 const HostMatrix& x, const HostMatrix& validation_x)
    : dev_(backend),
      problem_(problem),
      sample_(sample),
      options_(options),
      x_(x),
      validation_x_(validation_x),
      hidden_(problem.up.inputs()),
      neurons_(problem.up.outputs()),
      heads_(problem.heads),
      cost_(static_cast<float>(2 * (hidden_ / heads_))),
      weight_(problem.head_sensitivity * static_cast<float>(2 * neurons_ * problem.layers)) {}

FloatSelector HeadFit::FromCovariance() const {
  const int64_t samples = x_.rows;
  FloatSelector selector;
  selector.a = HostMatrix(heads_, hidden_);
  selector.b = HostMatrix(heads_, heads_);
  for (int64_t h = 0; h < heads_; ++h) {
    double mean = 0.0, squares = 0.0;
    for (int64_t i = 0; i < samples; ++i) {
      const double m = sample_.head_mass[i * heads_ + h];
      mean += m;
      squares += m * m;
    }
    mean /= static_cast<double>(samples);
    const double spread = std::sqrt(std::max(squares / static_cast<double>(samples) - mean * mean, 1e-30));
    for (int64_t i = 0; i < samples; ++i) {
      const auto m =
          static_cast<float>((sample_.head_mass[i * heads_ + h] - mean) / spread / static_cast<double>(samples));
      for (int64_t c = 0; c < hidden_; ++c) selector.a.row(h)[c] += m * x_.row(i)[c];
    }
    selector.b.row(h)[h] = 2.0f;
  }
  return selector;
}

void HeadFit::AddPoints(FloatSelector* selector) const {
  const int64_t samples = x_.rows;
  for (const double mu : options_.mus) {
    FloatSelector::Point& point = selector->points.emplace_back();
    point.rank = static_cast<int32_t>(heads_);
    point.mu = mu;
    for (int64_t h = 0; h < heads_; ++h) {
      int64_t worth_it = 1;
      for (int64_t i = 0; i < samples; ++i) worth_it += Gain(i, h, mu) > cost_;
      const double share = static_cast<double>(worth_it) / static_cast<double>(samples + 2);
      point.bias.push_back(static_cast<float>(std::clamp(std::log(share / (1.0 - share)), -4.0, 4.0)));
    }
  }
}

// As LayerFit's: the share of a dense layer's bytes, and mu times the nats that are missed.
double HeadFit::Objective(const FloatSelector& selector, const FloatSelector::Point& point) const {
  double rows_read = 0.0, nats = 0.0;
  const int64_t n = validation_x_.rows;
  HostMatrix h(n, heads_), s(n, heads_);
  MultiplyTransposed(dev_, validation_x_.tensor(), selector.a.tensor(), h.tensor());
  Multiply(dev_, h.tensor(), selector.b.tensor(), s.tensor());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < heads_; ++j) {
      if (s.row(i)[j] + point.bias[j] > 0.0f) {
        rows_read += cost_;
      } else {
        nats += problem_.head_sensitivity * sample_.validation_head_mass[i * heads_ + j];
      }
    }
  }
  const double tokens = static_cast<double>(n), dense = static_cast<double>(2 * neurons_);
  const double predictor = static_cast<double>(heads_ * (hidden_ + heads_)) / (2.0 * static_cast<double>(hidden_));
  return (rows_read / tokens + predictor) / dense + point.mu * problem_.layers * nats / tokens;
}

FloatSelector HeadFit::Run(const std::function<bool(double)>& keep_going) const {
  FloatSelector selector = FromCovariance();
  AddPoints(&selector);
  const GainFunction gains = [&](absl::Span<const int32_t> ids, double mu, HostMatrix* g) {
    for (size_t i = 0; i < ids.size(); ++i) {
      for (int64_t h = 0; h < heads_; ++h) {
        g->row(static_cast<int64_t>(i))[h] = (Gain(ids[i], h, mu) - cost_) / cost_;
      }
    }
  };
  TrainSelector(dev_, x_, gains, {options_.scan_epochs, 1e-2, 3}, keep_going, &selector);

  const double every_head =
      static_cast<double>(cost_) * static_cast<double>(heads_) / static_cast<double>(2 * neurons_);
  bool any = false;
  for (FloatSelector::Point& point : selector.points) {
    if (Objective(selector, point) < every_head) {
      any = true;
    } else {
      point.rank = 0;
    }
  }
  return any ? selector : FloatSelector();
}

}  // namespace dejavu
