#include "engine/calibration/layer_fit.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "engine/calibration/linear_algebra.h"
#include "engine/calibration/sensitivity.h"
#include "kernels/base/float16.h"

namespace dejavu {
namespace {

constexpr double kRidge = 1e-3;
constexpr int64_t kThresholdSamples = 4096;
constexpr int64_t kChunk = 512;
constexpr float kLargestWeight = 30.0f;
constexpr float kLargestBias = 12.0f;
constexpr double kLogitsPerSigma = 1.7;  // a logistic that looks like a Gaussian's tail

double NormalTail(double u) { return 0.5 * std::erfc(-u / std::sqrt(2.0)); }  // P(standard normal < u)

// The standardised prediction u above which computing a neuron is worth its cost: with z ~ N(u, 1),
//   k E[max(z, 0)^2] = k ((1 + u^2) Phi(u) + u phi(u)) = 1 + Phi(u).
class WorthTable {
 public:
  WorthTable() {
    for (double u = kLow; u <= kHigh; u += kStep) {
      const double phi = std::exp(-u * u / 2.0) / std::sqrt(2.0 * M_PI), cdf = NormalTail(u);
      log_ratio_.push_back(std::log((1.0 + cdf) / std::max((1.0 + u * u) * cdf + u * phi, 1e-300)));
    }
  }
  // Infinity: never worth it.
  double Threshold(double k) const {
    const double log_k = std::log(std::max(k, 1e-300));
    if (log_k < log_ratio_.back()) return std::numeric_limits<double>::infinity();
    // The ratio falls with u.
    const auto it = std::lower_bound(log_ratio_.begin(), log_ratio_.end(), log_k, std::greater<double>());
    return kLow + kStep * static_cast<double>(it - log_ratio_.begin());
  }

 private:
  static constexpr double kLow = -6.0, kHigh = 8.0, kStep = 0.01;
  std::vector<double> log_ratio_;
};

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
  Matrix White(const HalfRows& rows) const;
  FloatSelector Initial();
  Matrix Activations(const HalfRows& inputs, absl::Span<const int32_t> ids);
  void Gains(absl::Span<const int32_t> ids, double mu, Matrix* gains);
  double Objective(const FloatSelector& selector, const FloatSelector::Point& point);
  double ExactObjective() const { return (1.0 + validation_active_) / 2.0; }
  void PrepareValidation();
  FloatSelector Chosen(const FloatSelector& scanned);
  void ToTapSpace(FloatSelector* selector) const;
  FloatSelector FitHeads(const std::function<bool(double)>& keep_going);

  Backend& dev_;
  const LayerProblem& problem_;
  const LayerSample& sample_;
  const FitOptions& options_;
  const int64_t hidden_, neurons_;

  std::vector<float> mass_weight_;  // [neurons] w2^T F w2
  std::vector<float> loss_weight_;  // [neurons] what a^2 of a missed neuron costs at mu = 1
  std::vector<float> mean_;         // [hidden] of the tap
  Matrix white_;                    // [hidden, hidden] whitens what it multiplies from the right
  Matrix cross_;                    // [hidden, hidden] covariance of the white tap with the input that z is read from
  Matrix x_;                        // [samples, hidden] white taps
  Matrix validation_x_, validation_a_;  // [samples, hidden], [samples, neurons]
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
  white_ = Matrix(hidden_, hidden_);
  cross_ = Matrix(hidden_, hidden_);
  if (options_.method == FitMethod::kSvd) {
    for (int64_t i = 0; i < hidden_; ++i) white_.row(i)[i] = cross_.row(i)[i] = 1.0f;
    return;
  }
  for (int64_t i = 0; i < hidden_; ++i) mean_[i] = static_cast<float>(sample_.tap_sum[i] / n);
  Matrix covariance(hidden_, hidden_), cross(hidden_, hidden_);
  const Matrix& with = options_.method == FitMethod::kRegression ? sample_.tap_input : sample_.tap_tap;
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

Matrix Fitter::White(const HalfRows& rows) const {
  Matrix x(rows.rows(), hidden_);
  Matrix chunk(std::min(kChunk, rows.rows()), hidden_);
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

Matrix Fitter::Activations(const HalfRows& inputs, absl::Span<const int32_t> ids) {
  const auto count = static_cast<int64_t>(ids.size());
  Matrix x(count, hidden_), z(count, neurons_);
  for (int64_t i = 0; i < count; ++i) inputs.Copy(ids[i], x.row(i));
  dev_.Linear(z.tensor(), x.tensor(), problem_.up);
  return z;
}

// The leading directions of the map from the white tap to z, z scaled to unit spread: the best low-rank regression
// (reduced-rank regression: Izenman 1975). Prefixes of the components are the best maps of lower rank.
FloatSelector Fitter::Initial() {
  const int64_t count = std::min(kThresholdSamples, sample_.inputs.rows());
  std::vector<int32_t> ids(count);
  for (int64_t i = 0; i < count; ++i) ids[i] = static_cast<int32_t>(i * sample_.inputs.rows() / count);
  std::vector<double> sum(neurons_, 0.0), squares(neurons_, 0.0);
  for (int64_t first = 0; first < count; first += kChunk) {
    const Matrix z = Activations(sample_.inputs, absl::MakeConstSpan(ids).subspan(first, kChunk));
    for (int64_t i = 0; i < z.rows; ++i) {
      for (int64_t j = 0; j < neurons_; ++j) {
        sum[j] += z.row(i)[j];
        squares[j] += double{z.row(i)[j]} * z.row(i)[j];
      }
    }
  }
  // W1^T diag(1 / var z) W1, from W1 as the backend reads it: its product with the unit vectors.
  Matrix unit(hidden_, hidden_), columns(hidden_, neurons_);
  for (int64_t i = 0; i < hidden_; ++i) unit.row(i)[i] = 1.0f;
  LinearWeights up = problem_.up;
  up.bias = {};
  dev_.Linear(columns.tensor(), unit.tensor(), up);
  Matrix weighted = columns;
  if (options_.method == FitMethod::kRegression) {
    for (int64_t j = 0; j < neurons_; ++j) {
      const double mean = sum[j] / static_cast<double>(count);
      const double variance = std::max(squares[j] / static_cast<double>(count) - mean * mean, 1e-12);
      for (int64_t i = 0; i < hidden_; ++i) weighted.row(i)[j] = static_cast<float>(weighted.row(i)[j] / variance);
    }
  }
  Matrix gram(hidden_, hidden_);
  MultiplyTransposed(dev_, weighted.tensor(), columns.tensor(), gram.tensor());
  const Matrix between = Product(dev_, Product(dev_, cross_, gram), Transposed(cross_));

  FloatSelector selector;
  selector.a = LeadingEigenvectors(dev_, between, options_.ranks.back());
  selector.b = Product(dev_, Product(dev_, selector.a, cross_), columns);
  for (const int32_t rank : options_.ranks) {
    for (const double mu : options_.mus) selector.points.push_back({rank, mu, std::vector<float>(neurons_, 0.0f)});
  }
  // Mean and spread of what the prediction leaves over, per rank; from there each point's thresholds. Weights and
  // biases in units of a logistic's slope at the largest rank's spread.
  const size_t ranks = options_.ranks.size();
  std::vector<std::vector<double>> means(ranks, std::vector<double>(neurons_, 0.0)), spreads = means;
  for (int64_t first = 0; first < count; first += kChunk) {
    const auto chunk = absl::MakeConstSpan(ids).subspan(first, kChunk);
    Matrix residual = Activations(sample_.inputs, chunk);
    const int64_t n = residual.rows;
    Matrix x(n, hidden_), h(n, selector.a.rows), part(n, neurons_);
    for (int64_t i = 0; i < n; ++i) std::copy_n(x_.row(chunk[i]), hidden_, x.row(i));
    MultiplyTransposed(dev_, x.tensor(), selector.a.tensor(), h.tensor());
    for (size_t r = 0; r < ranks; ++r) {
      const int64_t from = r == 0 ? 0 : options_.ranks[r - 1], more = options_.ranks[r] - from;
      Multiply(dev_, h.tensor().Cols(from, more), selector.b.tensor().Rows(from, more), part.tensor());
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < neurons_; ++j) {
          const float left = residual.row(i)[j] -= part.row(i)[j];
          means[r][j] += left;
          spreads[r][j] += double{left} * left;
        }
      }
    }
  }
  const WorthTable table;
  std::vector<float> scale(neurons_);
  for (size_t r = ranks; r-- > 0;) {
    for (int64_t j = 0; j < neurons_; ++j) {
      const double mean = means[r][j] / static_cast<double>(count);
      const double sigma = std::sqrt(std::max(spreads[r][j] / static_cast<double>(count) - mean * mean, 1e-12));
      if (r + 1 == ranks) scale[j] = static_cast<float>(kLogitsPerSigma / sigma);
      for (size_t m = 0; m < options_.mus.size(); ++m) {
        const double u = table.Threshold(options_.mus[m] * loss_weight_[j] * sigma * sigma);
        const double bias = std::isinf(u) ? -kLargestBias : (mean - u * sigma) * scale[j];
        selector.points[r * options_.mus.size() + m].bias[j] =
            static_cast<float>(std::clamp<double>(bias, -kLargestBias, kLargestBias));
      }
    }
  }
  for (int64_t k = 0; k < selector.b.rows; ++k) {
    for (int64_t j = 0; j < neurons_; ++j) {
      selector.b.row(k)[j] = std::clamp(selector.b.row(k)[j] * scale[j], -kLargestWeight, kLargestWeight);
    }
  }
  return selector;
}

void Fitter::Gains(absl::Span<const int32_t> ids, double mu, Matrix* gains) {
  const Matrix z = Activations(sample_.inputs, ids);
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
    Matrix h(count, rank), s(count, neurons_), missed(count, hidden_), turned(count, hidden_);
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
  const auto keep = [&](Matrix* m) {
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
  Matrix a(selector->a.rows, hidden_);
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

// One component per head, from the covariance of the white tap with the head's mass. A head costs the rows of Q and of
// the out-projection that it has.
FloatSelector Fitter::FitHeads(const std::function<bool(double)>& keep_going) {
  const int64_t heads = problem_.heads, head_dim = hidden_ / heads, samples = x_.rows;
  const auto cost = static_cast<float>(2 * head_dim);
  const float weight = problem_.head_sensitivity * static_cast<float>(2 * neurons_ * problem_.layers);
  FloatSelector selector;
  selector.a = Matrix(heads, hidden_);
  selector.b = Matrix(heads, heads);
  for (int64_t h = 0; h < heads; ++h) {
    double mean = 0.0, squares = 0.0;
    for (int64_t i = 0; i < samples; ++i) {
      const double m = sample_.head_mass[i * heads + h];
      mean += m;
      squares += m * m;
    }
    mean /= static_cast<double>(samples);
    const double spread = std::sqrt(std::max(squares / static_cast<double>(samples) - mean * mean, 1e-30));
    for (int64_t i = 0; i < samples; ++i) {
      const auto m =
          static_cast<float>((sample_.head_mass[i * heads + h] - mean) / spread / static_cast<double>(samples));
      for (int64_t c = 0; c < hidden_; ++c) selector.a.row(h)[c] += m * x_.row(i)[c];
    }
    selector.b.row(h)[h] = 2.0f;
  }
  for (const double mu : options_.mus) {
    FloatSelector::Point& point = selector.points.emplace_back();
    point.rank = static_cast<int32_t>(heads);
    point.mu = mu;
    for (int64_t h = 0; h < heads; ++h) {
      int64_t worth_it = 1;
      for (int64_t i = 0; i < samples; ++i) {
        worth_it += static_cast<float>(mu) * weight * sample_.head_mass[i * heads + h] > cost;
      }
      const double share = static_cast<double>(worth_it) / static_cast<double>(samples + 2);
      point.bias.push_back(static_cast<float>(std::clamp(std::log(share / (1.0 - share)), -4.0, 4.0)));
    }
  }
  const GainFunction gains = [&](absl::Span<const int32_t> ids, double mu, Matrix* g) {
    for (size_t i = 0; i < ids.size(); ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        g->row(static_cast<int64_t>(i))[h] =
            (static_cast<float>(mu) * weight * sample_.head_mass[ids[i] * heads + h] - cost) / cost;
      }
    }
  };
  TrainSelector(dev_, x_, gains, {options_.scan_epochs, 1e-2, 3}, keep_going, &selector);

  // Keep a point only where it is better than computing every head.
  bool any = false;
  for (FloatSelector::Point& point : selector.points) {
    double rows_read = 0.0, nats = 0.0;
    const int64_t n = validation_x_.rows;
    Matrix h(n, heads), s(n, heads);
    MultiplyTransposed(dev_, validation_x_.tensor(), selector.a.tensor(), h.tensor());
    Multiply(dev_, h.tensor(), selector.b.tensor(), s.tensor());
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < heads; ++j) {
        if (s.row(i)[j] + point.bias[j] > 0.0f) {
          rows_read += cost;
        } else {
          nats += problem_.head_sensitivity * sample_.validation_head_mass[i * heads + j];
        }
      }
    }
    const double tokens = static_cast<double>(n), dense = static_cast<double>(2 * neurons_);
    const double predictor = static_cast<double>(heads * (hidden_ + heads)) / (2.0 * static_cast<double>(hidden_));
    const double objective = (rows_read / tokens + predictor) / dense + point.mu * problem_.layers * nats / tokens;
    if (objective < static_cast<double>(cost) * static_cast<double>(heads) / dense) {
      any = true;
    } else {
      point.rank = 0;
    }
  }
  if (!any) return {};
  ToTapSpace(&selector);
  return selector;
}

LayerFit Fitter::Run(const std::function<bool(double)>& keep_going) {
  FindWorth();
  Whiten();
  x_ = White(sample_.taps);
  PrepareValidation();
  FloatSelector selector = Initial();
  const GainFunction gains = [&](absl::Span<const int32_t> ids, double mu, Matrix* g) { Gains(ids, mu, g); };
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
  if (problem_.heads > 0) fit.heads = FitHeads(Phase(keep_going, 0.98, 1.0));
  return fit;
}

}  // namespace

void HalfRows::Reserve(int64_t rows, int64_t cols) {
  cols_ = cols;
  bits_.reserve(static_cast<size_t>(rows * cols));
}

void HalfRows::Append(const float* row) {
  for (int64_t c = 0; c < cols_; ++c) bits_.push_back(Float16FromFloat(row[c]));
}

void HalfRows::Copy(int64_t row, float* to) const {
  const uint16_t* from = &bits_[static_cast<size_t>(row * cols_)];
  for (int64_t c = 0; c < cols_; ++c) to[c] = FloatFromFloat16(from[c]);
}

LayerFit FitLayer(Backend& backend, const LayerProblem& problem, const LayerSample& sample, const FitOptions& options,
                  const std::function<bool(double done)>& keep_going) {
  return Fitter(backend, problem, sample, options).Run(keep_going);
}

SelectorData Quantise(const FloatSelector& selector, const std::vector<double>& shifts,
                      const std::vector<Tier>& tiers) {
  SelectorData data;
  const int64_t ranks = selector.a.rows, inputs = selector.a.cols, outputs = selector.b.cols;
  data.rank = static_cast<int32_t>(ranks);
  if (ranks == 0) return data;
  const auto quantise = [](const float* values, int64_t count, float factor, std::vector<int8_t>* to) {
    float largest = 1e-20f;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(values[i] * factor));
    const float step = largest / 127.0f;
    for (int64_t i = 0; i < count; ++i) {
      to->push_back(static_cast<int8_t>(std::lround(values[i] * factor / step)));
    }
    return step;
  };
  for (int64_t k = 0; k < ranks; ++k) {
    const float step = quantise(selector.b.row(k), outputs, 1.0f, &data.b);
    data.a_scale.push_back(quantise(selector.a.row(k), inputs, step, &data.a));
  }
  for (size_t i = 0; i < tiers.size(); ++i) {
    const FloatSelector::Point& point = selector.points[i];
    if (point.rank == 0) continue;
    OperatingPoint& to = data.points[static_cast<size_t>(tiers[i])].emplace();
    to.rank = point.rank;
    for (const float bias : point.bias) {
      to.thresholds.push_back(FloatFromFloat16(Float16FromFloat(static_cast<float>(-bias - shifts[i]))));
    }
  }
  return data;
}

}  // namespace dejavu
