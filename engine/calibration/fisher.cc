#include "engine/calibration/fisher.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "engine/calibration/softmax.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int kDrawsPerToken = 4;

// Keeps the residual stream after the last layer.
class LastStream final : public ModelObserver {
 public:
  explicit LastStream(int32_t layers) : layers_(layers) {}
  void OnInput(int32_t layer, Tap, Tensor x) override {
    if (layer != layers_) return;
    stream = HostMatrix(x.rows, x.cols);
    for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.row<float>(r), x.cols, stream.row(r));
  }
  HostMatrix stream;

 private:
  const int32_t layers_;
};

// The gradient with respect to x of u . norm(x), norm being LayerNorm with these weights.
void NormGradient(const float* x, const float* u, const float* weight, int64_t n, float epsilon, float* gradient) {
  double mean = 0.0, variance = 0.0;
  for (int64_t i = 0; i < n; ++i) mean += x[i];
  mean /= static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const double spread = std::sqrt(variance / static_cast<double>(n) + epsilon);
  double mean_u = 0.0, along = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double ui = double{u[i]} * weight[i];
    mean_u += ui;
    along += ui * (x[i] - mean) / spread;
  }
  mean_u /= static_cast<double>(n);
  along /= static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    const double normed = (x[i] - mean) / spread;
    gradient[i] = static_cast<float>((double{u[i]} * weight[i] - mean_u - normed * along) / spread);
  }
}

// Draws next tokens and takes gradients of their log-probabilities to the residual stream.
class GradientSampler {
 public:
  explicit GradientSampler(ModelRunner& runner)
      : config_(runner.config()),
        dev_(runner.backend()),
        final_norm_(runner.weights().final_norm),
        norm_(config_.hidden, 1.0f),
        random_(3) {
    const OptWeights& weights = runner.weights();
    if (config_.final_norm) dev_.Download(norm_.data(), final_norm_.weight);
    dev_.Synchronize();
    head_.layout = back_.layout = LinearWeights::Layout::kInputRows;
    head_.weight = weights.head.weight;
    back_.weight = weights.project_out.weight;
  }

  // Of one drawn token for each row: gradients [rows, hidden] of p [rows, vocab] and the stream [rows, hidden].
  HostMatrix Draw(const HostMatrix& p, const HostMatrix& stream) {
    const int64_t rows = p.rows, hidden = config_.hidden;
    HostMatrix draws(rows, config_.vocab), u(rows, config_.embed), wide(rows, hidden), g(rows, hidden);
    DrawTokens(p, &draws);
    dev_.Linear(u.tensor(), draws.tensor(), head_);
    if (!back_.weight.empty()) dev_.Linear(wide.tensor(), u.tensor(), back_);
    const HostMatrix& into = back_.weight.empty() ? u : wide;
    for (int64_t r = 0; r < rows; ++r) {
      if (config_.final_norm) {
        NormGradient(stream.row(r), into.row(r), norm_.data(), hidden, final_norm_.epsilon, g.row(r));
      } else {
        std::copy_n(into.row(r), hidden, g.row(r));
      }
    }
    return g;
  }

 private:
  // d log p(y) / d (head input) = E_y - sum of p_v E_v.
  void DrawTokens(const HostMatrix& p, HostMatrix* draws) {
    for (int64_t r = 0; r < p.rows; ++r) {
      float left = uniform_(random_);
      int64_t y = 0;
      while (y + 1 < p.cols && (left -= p.row(r)[y]) > 0.0f) ++y;
      for (int64_t v = 0; v < p.cols; ++v) draws->row(r)[v] = -p.row(r)[v];
      draws->row(r)[y] += 1.0f;
    }
  }

  const OptConfig& config_;
  Backend& dev_;
  const NormWeights& final_norm_;
  std::vector<float> norm_;  // [hidden]
  LinearWeights head_;       // sums of its rows: what a distribution over tokens looks like in the head's input
  LinearWeights back_;       // from the embedding's width to the stream's
  std::mt19937 random_;
  std::uniform_real_distribution<float> uniform_;
};

}  // namespace

HeadMetric::HeadMetric(Backend& backend, const LinearWeights& out, const HostMatrix& fisher, int32_t heads)
    : head_dim_(out.inputs() / heads) {
  const HostMatrix rows = DownRows(backend, out);
  const HostMatrix turned = Product(backend, rows, fisher);
  for (int32_t h = 0; h < heads; ++h) {
    HostMatrix& metric = metrics_.emplace_back(head_dim_, head_dim_);
    MultiplyTransposed(backend, turned.tensor().Rows(h * head_dim_, head_dim_),
                       rows.tensor().Rows(h * head_dim_, head_dim_), metric.tensor());
  }
}

double HeadMetric::Mass(int32_t head, const float* context) const {
  const float* c = context + head * head_dim_;
  const HostMatrix& metric = metrics_[head];
  double mass = 0.0;
  for (int64_t i = 0; i < head_dim_; ++i) {
    const float* row = metric.row(i);
    float sum = 0.0f;
    for (int64_t j = 0; j < head_dim_; ++j) sum += row[j] * c[j];
    mass += double{sum} * c[i];
  }
  return std::max(mass, 0.0);
}

HostMatrix DownRows(Backend& backend, const LinearWeights& down) {
  HostMatrix rows(down.inputs(), down.outputs());
  // A row is what a unit activation adds.
  constexpr int64_t kAtOnce = 64;
  HostMatrix unit(kAtOnce, down.inputs());
  LinearWeights w = down;
  w.bias = {};
  for (int64_t first = 0; first < rows.rows; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, rows.rows - first);
    for (int64_t i = 0; i < count; ++i) {
      std::fill_n(unit.row(i), unit.cols, 0.0f);
      unit.row(i)[first + i] = 1.0f;
    }
    backend.Linear(rows.tensor().Rows(first, count), unit.tensor().Rows(0, count), w);
  }
  return rows;
}

std::vector<float> FisherMasses(Backend& backend, const HostMatrix& down, const HostMatrix& fisher) {
  const HostMatrix turned = Product(backend, down, fisher);
  std::vector<float> masses;
  for (int64_t j = 0; j < down.rows; ++j) {
    double mass = 0.0;
    for (int64_t c = 0; c < down.cols; ++c) mass += double{turned.row(j)[c]} * down.row(j)[c];
    masses.push_back(static_cast<float>(std::max(mass, 0.0)));
  }
  return masses;
}

absl::StatusOr<HostMatrix> FisherInformation(ModelRunner& runner, const std::vector<Window>& windows,
                                             const StepProgress& progress) {
  const int64_t hidden = runner.config().hidden, vocab = runner.config().vocab;
  GradientSampler sampler(runner);
  LastStream last(runner.config().layers);
  const Observing observing(runner, &last);
  HostMatrix fisher(hidden, hidden), product(hidden, hidden);
  int64_t count = 0;
  for (size_t w = 0; w < windows.size(); ++w) {
    if (!progress(static_cast<double>(w) / static_cast<double>(windows.size()))) return CalibrationStopped();
    const absl::Span<const float> logits = RunWindow(runner, windows[w], /*wants_logits=*/true);
    HostMatrix p(last.stream.rows, vocab);
    for (int64_t r = 0; r < p.rows; ++r) Softmax(&logits[r * vocab], vocab, p.row(r));
    for (int draw = 0; draw < kDrawsPerToken; ++draw) {
      const HostMatrix g = sampler.Draw(p, last.stream);
      Multiply(runner.backend(), Transposed(g).tensor(), g.tensor(), product.tensor());
      for (size_t i = 0; i < product.values.size(); ++i) fisher.values[i] += product.values[i];
      count += g.rows;
    }
  }
  for (float& value : fisher.values) value /= static_cast<float>(count);
  return fisher;
}

}  // namespace dejavu
