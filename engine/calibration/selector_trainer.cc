#include "engine/calibration/selector_trainer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "kernels/base/fast_exp.h"

namespace dejavu {
namespace {

constexpr int64_t kBatch = 512;
constexpr float kLargestGain = 1000.0f;  // one rare token must not drown the rest
constexpr double kBeta1 = 0.9, kBeta2 = 0.99;
constexpr double kBiasRate = 3.0;
constexpr double kWarmUpSteps = 20.0;

// ds = |g| (sigmoid(s) - [g > 0]) / samples.
void Slopes(const HostMatrix& gains, HostMatrix* s) {
  const float share = 1.0f / static_cast<float>(gains.rows);
  const float* g = gains.values.data();
  float* v = s->values.data();
  const auto count = static_cast<int64_t>(gains.values.size());
  for (int64_t i = 0; i < count; ++i) {
    const float clipped = std::min(30.0f, std::max(-30.0f, v[i]));
    const float p = 1.0f / (1.0f + FastExp(-clipped));
    const float gain = std::min(kLargestGain, std::max(-kLargestGain, g[i]));
    v[i] = std::fabs(gain) * share * (p - (gain > 0.0f ? 1.0f : 0.0f));
  }
}

// First and second moments of the gradients of `rows` x `cols` parameters.
class Adam {
 public:
  Adam(int64_t rows, int64_t cols) : cols_(cols), first_(rows, cols), second_(rows, cols), steps_(rows, 0) {}

  // Row r of the parameters goes against its gradient.
  void Step(int64_t r, const float* gradient, double rate, float* parameters) {
    const int64_t step = ++steps_[r];
    const auto scale1 = static_cast<float>(rate / (1.0 - std::pow(kBeta1, step)));
    const auto scale2 = static_cast<float>(1.0 / (1.0 - std::pow(kBeta2, step)));
    float* m = first_.row(r);
    float* v = second_.row(r);
    for (int64_t i = 0; i < cols_; ++i) {
      m[i] += (gradient[i] - m[i]) * static_cast<float>(1.0 - kBeta1);
      v[i] += (gradient[i] * gradient[i] - v[i]) * static_cast<float>(1.0 - kBeta2);
      parameters[i] -= scale1 * m[i] / (std::sqrt(v[i] * scale2) + 1e-12f);
    }
  }

 private:
  const int64_t cols_;
  HostMatrix first_, second_;
  std::vector<int64_t> steps_;  // [rows]
};

Tensor Part(const HostMatrix& m, int64_t rows, int64_t cols) {
  return {const_cast<float*>(m.values.data()), DType::kFloat32, rows, cols, cols};
}

void TransposeInto(const float* from, int64_t rows, int64_t cols, HostMatrix* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) to->values[c * rows + r] = from[r * cols + c];
  }
}

class Trainer {
 public:
  Trainer(Backend& backend, const HostMatrix& x, const GainFunction& gains, const TrainingOptions& options,
          FloatSelector* selector)
      : dev_(backend),
        x_(x),
        gains_(gains),
        options_(options),
        selector_(*selector),
        inputs_(x.cols),
        outputs_(selector->b.cols),
        batch_(std::min(kBatch, x.rows)),
        random_(options.seed),
        order_(x.rows),
        adam_a_(selector->a.rows, inputs_),
        adam_b_(selector->a.rows, outputs_),
        adam_bias_(static_cast<int64_t>(selector->points.size()), outputs_),
        xs_(batch_, inputs_),
        g_(batch_, outputs_),
        s_(batch_, outputs_),
        h_(batch_, selector->a.rows),
        h_turned_(selector->a.rows, batch_),
        dh_(batch_, selector->a.rows),
        gradient_a_(selector->a.rows, inputs_),
        gradient_b_(selector->a.rows, outputs_),
        gradient_bias_(outputs_) {
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), random_);
  }

  void Run(int64_t steps, const std::function<bool(double done)>& keep_going) {
    for (int64_t step = 0; step < steps; ++step) {
      const double progress = static_cast<double>(step) / static_cast<double>(steps);
      if (step % 16 == 0 && !keep_going(progress)) return;
      const size_t tier = static_cast<size_t>(step % static_cast<int64_t>(selector_.points.size()));
      FindSlopes(TakeBatch(), selector_.points[tier]);
      FindGradients(selector_.points[tier].rank);
      const double warm_up = std::min(1.0, static_cast<double>(step) / kWarmUpSteps + 0.05);
      Descend(tier, options_.learning_rate * 0.5 * (1.0 + std::cos(M_PI * progress)) * warm_up);
    }
  }

 private:
  // The next samples in random order, into xs_.
  absl::Span<const int32_t> TakeBatch() {
    if (next_ + batch_ > x_.rows) {
      std::shuffle(order_.begin(), order_.end(), random_);
      next_ = 0;
    }
    const absl::Span<const int32_t> ids(&order_[next_], static_cast<size_t>(batch_));
    next_ += batch_;
    for (int64_t i = 0; i < batch_; ++i) std::copy_n(x_.row(ids[i]), inputs_, xs_.row(i));
    return ids;
  }

  // Forward: h = A x, s = h B + bias; then s becomes the loss's derivative with respect to it.
  void FindSlopes(absl::Span<const int32_t> ids, FloatSelector::Point& point) {
    gains_(ids, point.mu, &g_);
    const Tensor hidden = Part(h_, batch_, point.rank);
    MultiplyTransposed(dev_, xs_.tensor(), Part(selector_.a, point.rank, inputs_), hidden);
    LinearWeights second;
    second.layout = LinearWeights::Layout::kInputRows;
    second.weight = Part(selector_.b, point.rank, outputs_);
    second.bias = {point.bias.data(), DType::kFloat32, 1, outputs_, outputs_};
    dev_.Linear(s_.tensor(), hidden, second);
    Slopes(g_, &s_);
  }

  // Backward, of the first `rank` rows of A and B, and of the biases.
  void FindGradients(int64_t rank) {
    TransposeInto(h_.values.data(), batch_, rank, &h_turned_);
    Multiply(dev_, Part(h_turned_, rank, batch_), s_.tensor(), Part(gradient_b_, rank, outputs_));
    MultiplyTransposed(dev_, s_.tensor(), Part(selector_.b, rank, outputs_), Part(dh_, batch_, rank));
    TransposeInto(dh_.values.data(), batch_, rank, &h_turned_);
    Multiply(dev_, Part(h_turned_, rank, batch_), xs_.tensor(), Part(gradient_a_, rank, inputs_));
    std::fill(gradient_bias_.begin(), gradient_bias_.end(), 0.0f);
    for (int64_t i = 0; i < batch_; ++i) {
      const float* row = s_.row(i);
      for (int64_t j = 0; j < outputs_; ++j) gradient_bias_[j] += row[j];
    }
  }

  void Descend(size_t tier, double rate) {
    FloatSelector::Point& point = selector_.points[tier];
    for (int64_t k = 0; k < point.rank; ++k) {
      adam_a_.Step(k, gradient_a_.row(k), rate, selector_.a.row(k));
      adam_b_.Step(k, gradient_b_.row(k), rate, selector_.b.row(k));
    }
    adam_bias_.Step(static_cast<int64_t>(tier), gradient_bias_.data(), kBiasRate * rate, point.bias.data());
  }

  Backend& dev_;
  const HostMatrix& x_;
  const GainFunction& gains_;
  const TrainingOptions& options_;
  FloatSelector& selector_;
  const int64_t inputs_, outputs_, batch_;
  std::mt19937 random_;
  std::vector<int32_t> order_;  // [samples]
  int64_t next_ = 0;            // in order_
  Adam adam_a_, adam_b_, adam_bias_;
  HostMatrix xs_, g_, s_;               // [batch, inputs], [batch, outputs] twice
  HostMatrix h_, h_turned_, dh_;        // [batch, ranks], [ranks, batch], [batch, ranks]; their first parts are used
  HostMatrix gradient_a_, gradient_b_;  // [ranks, inputs], [ranks, outputs]
  std::vector<float> gradient_bias_;    // [outputs]
};

}  // namespace

void TrainSelector(Backend& backend, const HostMatrix& x, const GainFunction& gains, const TrainingOptions& options,
                   const std::function<bool(double done)>& keep_going, FloatSelector* selector) {
  const int64_t batch = std::min(kBatch, x.rows);
  const auto steps = static_cast<int64_t>(options.epochs * static_cast<double>(x.rows) / static_cast<double>(batch));
  if (steps == 0 || selector->points.empty()) return;
  Trainer(backend, x, gains, options, selector).Run(steps, keep_going);
}

}  // namespace dejavu
