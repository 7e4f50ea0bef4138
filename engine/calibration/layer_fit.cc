#include "engine/calibration/layer_fit.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/calibration/fisher.h"
#include "engine/calibration/head_fit.h"
#include "engine/calibration/linear_algebra.h"
#include "engine/calibration/worth_table.h"

namespace dejavu {
namespace {

constexpr double kRidge = 1e-3;
constexpr int64_t kThresholdSamples = 4096;
constexpr int64_t kChunk = 512;
constexpr float kLargestWeight = 30.0f;
constexpr float kLargestBias = 12.0f;
constexpr double kLogitsPerSigma = 1.7;  // a logistic that looks like a Gaussian's tail

class Fitter {
 public:
  Fitter(Backend& backend, const LayerProblem& problem, const LayerSample& sample, const FitOptions& options)
      : dev_(backend),
        problem_(problem),
        sample_(sample),
        options_(options),
        hidden_(problem.up.inputs()),
        neurons_(problem.up.outputs()) {}

  LayerFit Run(const std::function<bool(double)>& keep_going);

 private:
  // Where a share of the work stands in the whole.
  std::function<bool(double)> Phase(const std::function<bool(double)>& keep_going, double from, double to) const {
    return [=](double done) { return keep_going(from + (to - from) * done); };
  }
  void FindWorth();
  void Whiten();
  HostMatrix White(const HalfRows& rows) const;
  std::vector<int32_t> ThresholdSample() const;
  std::vector<double> Variances(absl::Span<const int32_t> ids);
  FloatSelector LowRankMap(absl::Span<const int32_t> ids);
  struct Residuals {
    std::vector<std::vector<double>> sums, squares;  // [ranks][neurons]
  };
  Residuals FindResiduals(const FloatSelector& selector, absl::Span<const int32_t> ids);
  void SetThresholds(const Residuals& residuals, double samples, FloatSelector* selector) const;
  FloatSelector Initial();
  HostMatrix Activations(const HalfRows& inputs, absl::Span<const int32_t> ids);
  void Gains(absl::Span<const int32_t> ids, double mu, HostMatrix* gains);
  double Objective(const FloatSelector& selector, const FloatSelector::Point& point);
  double ExactObjective() const { return (1.0 + validation_active_) / 2.0; }
  void PrepareValidation();
  FloatSelector Chosen(const FloatSelector& scanned);
  void ToTapSpace(FloatSelector* selector) const;

  Backend& dev_;
  const LayerProblem& problem_;
  const LayerSample& sample_;
  const FitOptions& options_;
  const int64_t hidden_, neurons_;

  std::vector<float> mass_weight_;  // [neurons] w2^T F w2
  std::vector<float> loss_weight_;  // [neurons] what a^2 of a missed neuron costs at mu = 1
  std::vector<float> mean_;         // [hidden] of the tap
  HostMatrix white_;                // [hidden, hidden] whitens what it multiplies from the right
  HostMatrix cross_;                // [hidden, hidden] covariance of the white tap with the input that z is read from
  HostMatrix x_;                    // [samples, hidden] white taps
  HostMatrix validation_x_, validation_a_;  // [samples, hidden], [samples, neurons]
  double validation_active_ = 0.0;
};

void Fitter::FindWorth() {
  mass_weight_ = FisherMasses(dev_, problem_.down, *problem_.fisher);
  loss_weight_.resize(neurons_);
  for (int64_t j = 0; j < neurons_; ++j) {
    loss_weight_[j] = mass_weight_[j] * problem_.sensitivity[j] * static_cast<float>(2 * neurons_ * problem_.layers);
  }
}

// Regression predicts z from the tap through their covariance; whitened SVD takes the tap for the input; plain SVD
// knows no data at all.
void Fitter::Whiten() {
  const double n = static_cast<double>(sample_.tokens);
  mean_.assign(hidden_, 0.0f);
  white_ = HostMatrix(hidden_, hidden_);
  cross_ = HostMatrix(hidden_, hidden_);
  if (options_.method == FitMethod::kSvd) {
    for (int64_t i = 0; i < hidden_; ++i) white_.row(i)[i] = cross_.row(i)[i] = 1.0f;
    return;
  }
  for (int64_t i = 0; i < hidden_; ++i) mean_[i] = static_cast<float>(sample_.tap_sum[i] / n);
  HostMatrix covariance(hidden_, hidden_), cross(hidden_, hidden_);
  const HostMatrix& with = options_.method == FitMethod::kRegression ? sample_.tap_input : sample_.tap_tap;
  // E[(x - m) y^T] = E[x y^T] - m E[y]^T; E[y] is found from the tap's constant direction only for y = x. For the
  // input, the mean's part falls out of the intercept, so the sample's mean serves.
  std::vector<double> with_mean(hidden_, 0.0);
  if (options_.method == FitMethod::kRegression) {
    std::vector<float> row(hidden_);
    const int64_t rows = sample_.inputs.rows();
    for (int64_t i = 0; i < rows; ++i) {
      sample_.inputs.Copy(i, row.data());
      for (int64_t c = 0; c < hidden_; ++c) with_mean[c] += row[c];
    }
    for (double& value : with_mean) value /= static_cast<double>(rows);
  } else {
    for (int64_t c = 0; c < hidden_; ++c) with_mean[c] = mean_[c];
  }
  for (int64_t i = 0; i < hidden_; ++i) {
    for (int64_t j = 0; j < hidden_; ++j) {
      covariance.row(i)[j] = static_cast<float>(sample_.tap_tap.row(i)[j] / n - double{mean_[i]} * mean_[j]);
      cross.row(i)[j] = static_cast<float>(with.row(i)[j] / n - double{mean_[i]} * with_mean[j]);
    }
  }
  white_ = WhiteningMatrix(covariance, kRidge);
  cross_ = Product(dev_, Transposed(white_), cross);
}

HostMatrix Fitter::White(const HalfRows& rows) const {
  HostMatrix x(rows.rows(), hidden_);
  HostMatrix chunk(std::min(kChunk, rows.rows()), hidden_);
  for (int64_t first = 0; first < rows.rows(); first += kChunk) {
    const int64_t count = std::min(kChunk, rows.rows() - first);
    for (int64_t i = 0; i < count; ++i) {
      rows.Copy(first + i, chunk.row(i));
      for (int64_t c = 0; c < hidden_; ++c) chunk.row(i)[c] -= mean_[c];
    }
    Multiply(dev_, chunk.tensor().Rows(0, count), white_.tensor(), x.tensor().Rows(first, count));
  }
  return x;
}

HostMatrix Fitter::Activations(const HalfRows& inputs, absl::Span<const int32_t> ids) {
  const auto count = static_cast<int64_t>(ids.size());
  HostMatrix x(count, hidden_), z(count, neurons_);
  for (int64_t i = 0; i < count; ++i) inputs.Copy(ids[i], x.row(i));
  dev_.Linear(z.tensor(), x.tensor(), problem_.up);
  return z;
}

// Rows of the sample, spread over it, by which thresholds are set.
std::vector<int32_t> Fitter::ThresholdSample() const {
  const int64_t count = std::min(kThresholdSamples, sample_.inputs.rows());
  std::vector<int32_t> ids(count);
  for (int64_t i = 0; i < count; ++i) ids[i] = static_cast<int32_t>(i * sample_.inputs.rows() / count);
  return ids;
}

// Of each neuron's pre-activation z.
std::vector<double> Fitter::Variances(absl::Span<const int32_t> ids) {
  std::vector<double> sum(neurons_, 0.0), squares(neurons_, 0.0), variances(neurons_);
  for (size_t first = 0; first < ids.size(); first += kChunk) {
    const HostMatrix z = Activations(sample_.inputs, ids.subspan(first, kChunk));
    for (int64_t i = 0; i < z.rows; ++i) {
      for (int64_t j = 0; j < neurons_; ++j) {
        sum[j] += z.row(i)[j];
        squares[j] += double{z.row(i)[j]} * z.row(i)[j];
      }
    }
  }
  for (int64_t j = 0; j < neurons_; ++j) {
    const double mean = sum[j] / static_cast<double>(ids.size());
    variances[j] = std::max(squares[j] / static_cast<double>(ids.size()) - mean * mean, 1e-12);
  }
  return variances;
}

// The leading directions of the map from the white tap to z, z scaled to unit spread: the best low-rank regression
// (reduced-rank regression: Izenman 1975). Prefixes of the components are the best maps of lower rank.
FloatSelector Fitter::LowRankMap(absl::Span<const int32_t> ids) {
  // W1^T diag(1 / var z) W1, from W1 as the backend reads it: its product with the unit vectors.
  HostMatrix unit(hidden_, hidden_), columns(hidden_, neurons_);
  for (int64_t i = 0; i < hidden_; ++i) unit.row(i)[i] = 1.0f;
  LinearWeights up = problem_.up;
  up.bias = {};
  dev_.Linear(columns.tensor(), unit.tensor(), up);
  HostMatrix weighted = columns;
  if (options_.method == FitMethod::kRegression) {
    const std::vector<double> variances = Variances(ids);
    for (int64_t j = 0; j < neurons_; ++j) {
      for (int64_t i = 0; i < hidden_; ++i) weighted.row(i)[j] = static_cast<float>(weighted.row(i)[j] / variances[j]);
    }
  }
  HostMatrix gram(hidden_, hidden_);
  MultiplyTransposed(dev_, weighted.tensor(), columns.tensor(), gram.tensor());
  const HostMatrix between = Product(dev_, Product(dev_, cross_, gram), Transposed(cross_));

  FloatSelector selector;
  selector.a = LeadingEigenvectors(dev_, between, options_.ranks.back());
  selector.b = Product(dev_, Product(dev_, selector.a, cross_), columns);
  return selector;
}

// What the prediction of each rank leaves over.
Fitter::Residuals Fitter::FindResiduals(const FloatSelector& selector, absl::Span<const int32_t> ids) {
  const size_t ranks = options_.ranks.size();
  Residuals residuals;
  residuals.sums = residuals.squares = {ranks, std::vector<double>(neurons_, 0.0)};
  for (size_t first = 0; first < ids.size(); first += kChunk) {
    const auto chunk = ids.subspan(first, kChunk);
    HostMatrix residual = Activations(sample_.inputs, chunk);
    const int64_t n = residual.rows;
    HostMatrix x(n, hidden_), h(n, selector.a.rows), part(n, neurons_);
    for (int64_t i = 0; i < n; ++i) std::copy_n(x_.row(chunk[i]), hidden_, x.row(i));
    MultiplyTransposed(dev_, x.tensor(), selector.a.tensor(), h.tensor());
    for (size_t r = 0; r < ranks; ++r) {
      const int64_t from = r == 0 ? 0 : options_.ranks[r - 1], more = options_.ranks[r] - from;
      Multiply(dev_, h.tensor().Cols(from, more), selector.b.tensor().Rows(from, more), part.tensor());
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < neurons_; ++j) {
          const float left = residual.row(i)[j] -= part.row(i)[j];
          residuals.sums[r][j] += left;
          residuals.squares[r][j] += double{left} * left;
        }
      }
    }
  }
  return residuals;
}

// From mean and spread of what the prediction leaves over, each point's thresholds. Weights and biases are in units of
// a logistic's slope at the largest rank's spread.
void Fitter::SetThresholds(const Residuals& residuals, double samples, FloatSelector* selector) const {
  const WorthTable table;
  const size_t ranks = options_.ranks.size();
  std::vector<float> scale(neurons_);
  for (size_t r = ranks; r-- > 0;) {
    for (int64_t j = 0; j < neurons_; ++j) {
      const double mean = residuals.sums[r][j] / samples;
      const double sigma = std::sqrt(std::max(residuals.squares[r][j] / samples - mean * mean, 1e-12));
      if (r + 1 == ranks) scale[j] = static_cast<float>(kLogitsPerSigma / sigma);
      for (size_t m = 0; m < options_.mus.size(); ++m) {
        const double u = table.Threshold(options_.mus[m] * loss_weight_[j] * sigma * sigma);
        const double bias = std::isinf(u) ? -kLargestBias : (mean - u * sigma) * scale[j];
        selector->points[r * options_.mus.size() + m].bias[j] =
            static_cast<float>(std::clamp<double>(bias, -kLargestBias, kLargestBias));
      }
    }
  }
  for (int64_t k = 0; k < selector->b.rows; ++k) {
    for (int64_t j = 0; j < neurons_; ++j) {
      selector->b.row(k)[j] = std::clamp(selector->b.row(k)[j] * scale[j], -kLargestWeight, kLargestWeight);
    }
  }
}

// Where training starts, with a point for each rank and tier.
FloatSelector Fitter::Initial() {
  const std::vector<int32_t> ids = ThresholdSample();
  FloatSelector selector = LowRankMap(ids);
  for (const int32_t rank : options_.ranks) {
    for (const double mu : options_.mus) selector.points.push_back({rank, mu, std::vector<float>(neurons_, 0.0f)});
  }
  SetThresholds(FindResiduals(selector, ids), static_cast<double>(ids.size()), &selector);
  return selector;
}

void Fitter::Gains(absl::Span<const int32_t> ids, double mu, HostMatrix* gains) {
  const HostMatrix z = Activations(sample_.inputs, ids);
  for (int64_t i = 0; i < z.rows; ++i) {
    const float* zi = z.row(i);
    float* g = gains->row(i);
    for (int64_t j = 0; j < neurons_; ++j) {
      const float a = std::max(zi[j], 0.0f);
      g[j] = static_cast<float>(mu) * loss_weight_[j] * a * a - 1.0f - (a > 0.0f ? 1.0f : 0.0f);
    }
  }
}

void Fitter::PrepareValidation() {
  const int64_t count = sample_.validation_inputs.rows();
  std::vector<int32_t> ids(count);
  for (int64_t i = 0; i < count; ++i) ids[i] = static_cast<int32_t>(i);
  validation_x_ = White(sample_.validation_taps);
  validation_a_ = Activations(sample_.validation_inputs, ids);
  int64_t active = 0;
  for (float& a : validation_a_.values) {
    a = std::max(a, 0.0f);
    active += a > 0.0f;
  }
  validation_active_ = static_cast<double>(active) / static_cast<double>(validation_a_.values.size());
}

// The share of a dense layer's bytes, and mu times the nats that the missed output costs: its Fisher energy, and for
// neurons that matter more than that says, their own share on top.
double Fitter::Objective(const FloatSelector& selector, const FloatSelector::Point& point) {
  const int64_t rank = point.rank, n = validation_x_.rows;
  int64_t rows_read = 0;
  double energy = 0.0, extra = 0.0;
  for (int64_t first = 0; first < n; first += kChunk) {
    const int64_t count = std::min(kChunk, n - first);
    HostMatrix h(count, rank), s(count, neurons_), missed(count, hidden_), turned(count, hidden_);
    MultiplyTransposed(dev_, validation_x_.tensor().Rows(first, count), selector.a.tensor().Rows(0, rank), h.tensor());
    Multiply(dev_, h.tensor(), selector.b.tensor().Rows(0, rank), s.tensor());
    for (int64_t i = 0; i < count; ++i) {
      const float* a = validation_a_.row(first + i);
      float* si = s.row(i);
      for (int64_t j = 0; j < neurons_; ++j) {
        const bool selected = si[j] + point.bias[j] > 0.0f;
        rows_read += selected ? 1 + (a[j] > 0.0f) : 0;
        si[j] = selected ? 0.0f : a[j];
        extra += double{si[j]} * si[j] * mass_weight_[j] * (problem_.sensitivity[j] - problem_.common_sensitivity);
      }
    }
    Multiply(dev_, s.tensor(), problem_.down.tensor(), missed.tensor());
    Multiply(dev_, missed.tensor(), problem_.fisher->tensor(), turned.tensor());
    for (size_t i = 0; i < missed.values.size(); ++i) energy += double{missed.values[i]} * turned.values[i];
  }
  const double tokens = static_cast<double>(n), neurons = static_cast<double>(neurons_);
  const double bytes =
      static_cast<double>(rows_read) / (2.0 * neurons * tokens) +
      static_cast<double>(rank * (hidden_ + neurons_)) / (4.0 * neurons * static_cast<double>(hidden_)) +
      1.0 / (2.0 * static_cast<double>(hidden_));
  const double nats = (problem_.common_sensitivity * energy + extra) / tokens;
  return bytes + point.mu * problem_.layers * nats;
}

// For each tier the rank with the least objective; rank 0 where EXACT is no worse.
FloatSelector Fitter::Chosen(const FloatSelector& scanned) {
  FloatSelector chosen;
  chosen.a = scanned.a;
  chosen.b = scanned.b;
  int32_t largest = 0;
  for (const double mu : options_.mus) {
    FloatSelector::Point best;
    best.mu = mu;
    double least = ExactObjective();
    for (const FloatSelector::Point& point : scanned.points) {
      if (point.mu != mu) continue;
      const double value = Objective(scanned, point);
      if (value >= least) continue;
      least = value;
      best = point;
    }
    largest = std::max(largest, best.rank);
    chosen.points.push_back(std::move(best));
  }
  const auto keep = [&](HostMatrix* m) {
    m->rows = largest;
    m->values.resize(static_cast<size_t>(largest * m->cols));
  };
  keep(&chosen.a);
  keep(&chosen.b);
  return chosen;
}

// A (x - mean) W = (A W^T)(x - mean).
void Fitter::ToTapSpace(FloatSelector* selector) const {
  if (selector->a.rows == 0) return;
  HostMatrix a(selector->a.rows, hidden_);
  MultiplyTransposed(dev_, selector->a.tensor(), white_.tensor(), a.tensor());
  selector->a = std::move(a);
  for (FloatSelector::Point& point : selector->points) {
    for (int64_t k = 0; k < point.rank; ++k) {
      double at_mean = 0.0;
      for (int64_t c = 0; c < hidden_; ++c) at_mean += double{selector->a.row(k)[c]} * mean_[c];
      for (int64_t j = 0; j < selector->b.cols; ++j) {
        point.bias[j] -= static_cast<float>(at_mean * selector->b.row(k)[j]);
      }
    }
  }
}

LayerFit Fitter::Run(const std::function<bool(double)>& keep_going) {
  FindWorth();
  Whiten();
  x_ = White(sample_.taps);
  PrepareValidation();
  FloatSelector selector = Initial();
  const GainFunction gains = [&](absl::Span<const int32_t> ids, double mu, HostMatrix* g) { Gains(ids, mu, g); };
  TrainSelector(dev_, x_, gains, {options_.scan_epochs, 1e-2, 1}, Phase(keep_going, 0.1, 0.65), &selector);
  LayerFit fit;
  fit.neurons = Chosen(selector);
  FloatSelector refined = fit.neurons;
  refined.points.erase(std::remove_if(refined.points.begin(), refined.points.end(),
                                      [](const FloatSelector::Point& point) { return point.rank == 0; }),
                       refined.points.end());
  TrainSelector(dev_, x_, gains, {options_.refine_epochs, 5e-3, 2}, Phase(keep_going, 0.7, 0.98), &refined);
  size_t next = 0;
  fit.neurons.a = refined.a;
  fit.neurons.b = refined.b;
  for (FloatSelector::Point& point : fit.neurons.points) {
    if (point.rank > 0) point = refined.points[next++];
  }
  ToTapSpace(&fit.neurons);
  if (problem_.heads > 0) {
    fit.heads = HeadFit(dev_, problem_, sample_, options_, x_, validation_x_).Run(Phase(keep_going, 0.98, 1.0));
    ToTapSpace(&fit.heads);
  }
  return fit;
}

}  // namespace

LayerFit FitLayer(Backend& backend, const LayerProblem& problem, const LayerSample& sample, const FitOptions& options,
                  const std::function<bool(double done)>& keep_going) {
  return Fitter(backend, problem, sample, options).Run(keep_going);
}

}  // namespace dejavu
