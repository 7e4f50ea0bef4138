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
void Slopes(const Matrix& gains, Matrix* s) {
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
  Matrix first_, second_;
  std::vector<int64_t> steps_;  // [rows]
};

Tensor Part(const Matrix& m, int64_t rows, int64_t cols) {
  return {const_cast<float*>(m.values.data()), DType::kFloat32, rows, cols, cols};
}

void TransposeInto(const float* from, int64_t rows, int64_t cols, Matrix* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) to->values[c * rows + r] = from[r * cols + c];
  }
}

}  // namespace

void TrainSelector(Backend& backend, const Matrix& x, const GainFunction& gains, const TrainingOptions& options,
                   const std::function<bool(double done)>& keep_going, FloatSelector* selector) {
  const int64_t inputs = x.cols, outputs = selector->b.cols, ranks = selector->a.rows;
  const int64_t batch = std::min(kBatch, x.rows);
  const auto steps = static_cast<int64_t>(options.epochs * static_cast<double>(x.rows) / static_cast<double>(batch));
  if (steps == 0 || selector->points.empty()) return;
  std::mt19937 random(options.seed);
  std::vector<int32_t> order(x.rows);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);

  Adam adam_a(ranks, inputs), adam_b(ranks, outputs);
  Adam adam_bias(static_cast<int64_t>(selector->points.size()), outputs);
  Matrix xs(batch, inputs), g(batch, outputs), s(batch, outputs);
  Matrix h(batch, ranks), h_turned(ranks, batch), dh(batch, ranks), gradient_a(ranks, inputs),
      gradient_b(ranks, outputs);
  std::vector<float> gradient_bias(outputs);
  int64_t next = 0;
  for (int64_t step = 0; step < steps; ++step) {
    if (step % 16 == 0 && !keep_going(static_cast<double>(step) / static_cast<double>(steps))) return;
    if (next + batch > x.rows) {
      std::shuffle(order.begin(), order.end(), random);
      next = 0;
    }
    const absl::Span<const int32_t> ids(&order[next], static_cast<size_t>(batch));
    next += batch;
    for (int64_t i = 0; i < batch; ++i) std::copy_n(x.row(ids[i]), inputs, xs.row(i));
    const auto tier = static_cast<size_t>(step % static_cast<int64_t>(selector->points.size()));
    FloatSelector::Point& point = selector->points[tier];
    const int64_t r = point.rank;
    gains(ids, point.mu, &g);

    const Tensor a = Part(selector->a, r, inputs), b = Part(selector->b, r, outputs), hidden = Part(h, batch, r);
    MultiplyTransposed(backend, xs.tensor(), a, hidden);
    LinearWeights second;
    second.layout = LinearWeights::Layout::kInputRows;
    second.weight = b;
    second.bias = {point.bias.data(), DType::kFloat32, 1, outputs, outputs};
    backend.Linear(s.tensor(), hidden, second);
    Slopes(g, &s);

    TransposeInto(h.values.data(), batch, r, &h_turned);
    Multiply(backend, Part(h_turned, r, batch), s.tensor(), Part(gradient_b, r, outputs));
    MultiplyTransposed(backend, s.tensor(), b, Part(dh, batch, r));
    TransposeInto(dh.values.data(), batch, r, &h_turned);
    Multiply(backend, Part(h_turned, r, batch), xs.tensor(), Part(gradient_a, r, inputs));
    std::fill(gradient_bias.begin(), gradient_bias.end(), 0.0f);
    for (int64_t i = 0; i < batch; ++i) {
      const float* row = s.row(i);
      for (int64_t j = 0; j < outputs; ++j) gradient_bias[j] += row[j];
    }

    const double progress = static_cast<double>(step) / static_cast<double>(steps);
    const double warm_up = std::min(1.0, static_cast<double>(step) / kWarmUpSteps + 0.05);
    const double rate = options.learning_rate * 0.5 * (1.0 + std::cos(M_PI * progress)) * warm_up;
    for (int64_t k = 0; k < r; ++k) {
      adam_a.Step(k, gradient_a.row(k), rate, selector->a.row(k));
      adam_b.Step(k, gradient_b.row(k), rate, selector->b.row(k));
    }
    adam_bias.Step(static_cast<int64_t>(tier), gradient_bias.data(), kBiasRate * rate, point.bias.data());
  }
}

}  // namespace dejavu
