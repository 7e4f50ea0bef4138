#include "engine/calibration/sensitivity.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "kernels/base/fast_exp.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int kDrawsPerToken = 4;
constexpr double kDropShare = 0.1;
constexpr double kLeastMass = 1e-12;

absl::Status Stopped() { return absl::CancelledError("calibration was stopped"); }

// Runs a window as one prompt; logits for every position.
absl::Span<const float> RunWindow(ModelRunner& runner, Window window) {
  Batch& batch = runner.StartBatch();
  for (size_t i = 0; i < window.size(); ++i) {
    batch.AddRow(0, static_cast<int32_t>(i), window[i], /*wants_logits=*/true);
  }
  return runner.Run();
}

// probabilities = softmax(logits) of one row; returns the log of the sum that it divides by, from zero.
double Softmax(const float* logits, int64_t count, float* probabilities) {
  const float largest = *std::max_element(logits, logits + count);
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    probabilities[i] = FastExp(std::max(-80.0f, logits[i] - largest));
    sum += probabilities[i];
  }
  const auto share = static_cast<float>(1.0 / sum);
  for (int64_t i = 0; i < count; ++i) probabilities[i] *= share;
  return largest + std::log(sum);
}

// Keeps the residual stream after the last layer.
class LastStream final : public ModelObserver {
 public:
  explicit LastStream(int32_t layers) : layers_(layers) {}
  void OnInput(int32_t layer, Tap, Tensor x) override {
    if (layer != layers_) return;
    stream = Matrix(x.rows, x.cols);
    for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.row<float>(r), x.cols, stream.row(r));
  }
  Matrix stream;

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

// Leaves out a share of some neurons' activations of one layer, at random, and gives back the mean of what is missing:
// a shift of every token alike is not what a predictor does.
class Dropper final : public ModelObserver {
 public:
  Dropper(int32_t layer, const Matrix& down, std::vector<float> mass_weight)
      : layer_(layer), down_(down), mass_weight_(std::move(mass_weight)) {}

  void Reset(std::vector<uint8_t> dropped) {
    dropped_ = std::move(dropped);
    random_.seed(7);
    mass = 0.0;
    rows = 0;
  }

  void OnMlp(int32_t layer, Tensor activations, Tensor y) override {
    if (layer != layer_ || dropped_.empty()) return;
    const int64_t hidden = y.cols;
    Matrix missing(y.rows, hidden);
    std::vector<double> mean(hidden, 0.0);
    for (int64_t r = 0; r < y.rows; ++r) {
      const float* a = activations.row<float>(r);
      for (int64_t j = 0; j < activations.cols; ++j) {
        if (!dropped_[j] || a[j] == 0.0f || random_() > kDropShare * std::mt19937::max()) continue;
        mass += double{a[j]} * a[j] * mass_weight_[j];
        for (int64_t c = 0; c < hidden; ++c) missing.row(r)[c] += a[j] * down_.row(j)[c];
      }
      for (int64_t c = 0; c < hidden; ++c) mean[c] += missing.row(r)[c];
    }
    for (int64_t r = 0; r < y.rows; ++r) {
      float* row = y.row<float>(r);
      for (int64_t c = 0; c < hidden; ++c) {
        row[c] += static_cast<float>(mean[c] / static_cast<double>(y.rows)) - missing.row(r)[c];
      }
    }
    rows += y.rows;
  }

  double mass = 0.0;
  int64_t rows = 0;

 private:
  const int32_t layer_;
  const Matrix& down_;
  const std::vector<float> mass_weight_;
  std::vector<uint8_t> dropped_;  // [ffn]
  std::mt19937 random_;
};

// Leaves out a share of the heads' outputs of one layer, at random.
class HeadDropper final : public ModelObserver {
 public:
  HeadDropper(int32_t layer, int32_t heads, const HeadMetric& metric)
      : layer_(layer), heads_(heads), metric_(metric), random_(11) {}

  void OnContext(int32_t layer, Tensor context) override {
    if (layer != layer_) return;
    const int64_t head_dim = context.cols / heads_;
    for (int64_t r = 0; r < context.rows; ++r) {
      float* row = context.row<float>(r);
      for (int32_t h = 0; h < heads_; ++h) {
        if (random_() > kDropShare * std::mt19937::max()) continue;
        mass += metric_.Mass(h, row);
        std::fill_n(row + h * head_dim, head_dim, 0.0f);
      }
    }
    rows += context.rows;
  }

  double mass = 0.0;
  int64_t rows = 0;

 private:
  const int32_t layer_, heads_;
  const HeadMetric& metric_;
  std::mt19937 random_;
};

// Sums activation^2 by neuron, for every layer.
class Loudness final : public ModelObserver {
 public:
  Loudness(int32_t layers, int64_t ffn) : squares(layers, std::vector<double>(ffn, 0.0)) {}
  void OnMlp(int32_t layer, Tensor activations, Tensor) override {
    for (int64_t r = 0; r < activations.rows; ++r) {
      const float* a = activations.row<float>(r);
      for (int64_t j = 0; j < activations.cols; ++j) squares[layer][j] += double{a[j]} * a[j];
    }
  }
  std::vector<std::vector<double>> squares;  // [layers][ffn]
};

// The distributions of some windows in DENSE, to hold others against.
class DenseReference {
 public:
  DenseReference(ModelRunner& runner, std::vector<Window> windows) : runner_(runner), windows_(std::move(windows)) {
    const int64_t vocab = runner.config().vocab;
    for (const Window window : windows_) {
      const absl::Span<const float> logits = RunWindow(runner_, window);
      Matrix p(static_cast<int64_t>(window.size()), vocab);
      double negentropy = 0.0;  // sum of p log p
      for (int64_t r = 0; r < p.rows; ++r) {
        const double log_sum = Softmax(&logits[r * vocab], vocab, p.row(r));
        double mean = 0.0;
        for (int64_t i = 0; i < vocab; ++i) mean += double{p.row(r)[i]} * logits[r * vocab + i];
        negentropy += mean - log_sum;
      }
      probabilities_.push_back(std::move(p));
      negentropies_.push_back(negentropy);
    }
  }

  int64_t tokens() const {
    int64_t n = 0;
    for (const Window window : windows_) n += static_cast<int64_t>(window.size());
    return n;
  }

  // Mean KL(DENSE || the model as it runs now) over the first windows.
  double Kl(size_t windows) {
    const int64_t vocab = runner_.config().vocab;
    std::vector<float> scratch(vocab);
    double kl = 0.0;
    int64_t rows = 0;
    for (size_t w = 0; w < std::min(windows, windows_.size()); ++w) {
      const absl::Span<const float> logits = RunWindow(runner_, windows_[w]);
      const Matrix& p = probabilities_[w];
      kl += negentropies_[w];
      for (int64_t r = 0; r < p.rows; ++r) {
        const float* q = &logits[r * vocab];
        double mean = 0.0;
        for (int64_t i = 0; i < vocab; ++i) mean += double{p.row(r)[i]} * q[i];
        kl += Softmax(q, vocab, scratch.data()) - mean;
      }
      rows += p.rows;
    }
    return std::max(0.0, kl / static_cast<double>(rows));
  }

 private:
  ModelRunner& runner_;
  const std::vector<Window> windows_;
  std::vector<Matrix> probabilities_;  // by window [tokens, vocab]
  std::vector<double> negentropies_;
};

// Detaches the observer from the model however the function ends.
class Observing {
 public:
  Observing(ModelRunner& runner, ModelObserver* observer) : runner_(runner) { runner_.model().set_observer(observer); }
  ~Observing() { runner_.model().set_observer(nullptr); }

 private:
  ModelRunner& runner_;
};

}  // namespace

HeadMetric::HeadMetric(Backend& backend, const LinearWeights& out, const Matrix& fisher, int32_t heads)
    : head_dim_(out.inputs() / heads) {
  const Matrix rows = DownRows(backend, out);
  const Matrix turned = Product(backend, rows, fisher);
  for (int32_t h = 0; h < heads; ++h) {
    Matrix& metric = metrics_.emplace_back(head_dim_, head_dim_);
    MultiplyTransposed(backend, turned.tensor().Rows(h * head_dim_, head_dim_),
                       rows.tensor().Rows(h * head_dim_, head_dim_), metric.tensor());
  }
}

double HeadMetric::Mass(int32_t head, const float* context) const {
  const float* c = context + head * head_dim_;
  const Matrix& metric = metrics_[head];
  double mass = 0.0;
  for (int64_t i = 0; i < head_dim_; ++i) {
    const float* row = metric.row(i);
    float sum = 0.0f;
    for (int64_t j = 0; j < head_dim_; ++j) sum += row[j] * c[j];
    mass += double{sum} * c[i];
  }
  return std::max(mass, 0.0);
}

Matrix DownRows(Backend& backend, const LinearWeights& down) {
  Matrix rows(down.inputs(), down.outputs());
  // A row is what a unit activation adds.
  constexpr int64_t kAtOnce = 64;
  Matrix unit(kAtOnce, down.inputs());
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

std::vector<float> FisherMasses(Backend& backend, const Matrix& down, const Matrix& fisher) {
  const Matrix turned = Product(backend, down, fisher);
  std::vector<float> masses;
  for (int64_t j = 0; j < down.rows; ++j) {
    double mass = 0.0;
    for (int64_t c = 0; c < down.cols; ++c) mass += double{turned.row(j)[c]} * down.row(j)[c];
    masses.push_back(static_cast<float>(std::max(mass, 0.0)));
  }
  return masses;
}

absl::StatusOr<Matrix> FisherInformation(ModelRunner& runner, const std::vector<Window>& windows,
                                         const StepProgress& progress) {
  const OptConfig& config = runner.config();
  const int64_t hidden = config.hidden, vocab = config.vocab, embed = config.embed;
  Backend& dev = runner.backend();
  const OptWeights& weights = runner.weights();
  std::vector<float> norm(hidden, 1.0f);
  if (config.final_norm) dev.Download(norm.data(), weights.final_norm.weight);
  dev.Synchronize();
  // Sums of rows of the head: what a distribution over tokens looks like in its input.
  LinearWeights head;
  head.layout = LinearWeights::Layout::kInputRows;
  head.weight = weights.head.weight;
  LinearWeights back;  // from the embedding's width to the stream's
  back.layout = LinearWeights::Layout::kInputRows;
  back.weight = weights.project_out.weight;

  LastStream last(config.layers);
  const Observing observing(runner, &last);
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform;
  Matrix fisher(hidden, hidden), product(hidden, hidden);
  int64_t count = 0;
  for (size_t w = 0; w < windows.size(); ++w) {
    if (!progress(static_cast<double>(w) / static_cast<double>(windows.size()))) return Stopped();
    const absl::Span<const float> logits = RunWindow(runner, windows[w]);
    const int64_t rows = last.stream.rows;
    Matrix p(rows, vocab), u(rows, embed), wide(rows, hidden), g(rows, hidden);
    for (int64_t r = 0; r < rows; ++r) Softmax(&logits[r * vocab], vocab, p.row(r));
    Matrix draws(rows, vocab);
    for (int draw = 0; draw < kDrawsPerToken; ++draw) {
      // d log p(y) / d (head input) = E_y - sum of p_v E_v.
      for (int64_t r = 0; r < rows; ++r) {
        float left = uniform(random);
        int64_t y = 0;
        while (y + 1 < vocab && (left -= p.row(r)[y]) > 0.0f) ++y;
        for (int64_t v = 0; v < vocab; ++v) draws.row(r)[v] = -p.row(r)[v];
        draws.row(r)[y] += 1.0f;
      }
      dev.Linear(u.tensor(), draws.tensor(), head);
      if (!back.weight.empty()) dev.Linear(wide.tensor(), u.tensor(), back);
      const Matrix& into = back.weight.empty() ? u : wide;
      for (int64_t r = 0; r < rows; ++r) {
        if (config.final_norm) {
          NormGradient(last.stream.row(r), into.row(r), norm.data(), hidden, weights.final_norm.epsilon, g.row(r));
        } else {
          std::copy_n(into.row(r), hidden, g.row(r));
        }
      }
      Multiply(dev, Transposed(g).tensor(), g.tensor(), product.tensor());
      for (size_t i = 0; i < product.values.size(); ++i) fisher.values[i] += product.values[i];
      count += rows;
    }
  }
  for (float& value : fisher.values) value /= static_cast<float>(count);
  return fisher;
}

absl::StatusOr<std::vector<LayerSensitivity>> Sensitivities(ModelRunner& runner, const Matrix& fisher,
                                                            const std::vector<Window>& windows, int64_t tokens_per_run,
                                                            int32_t loud, const StepProgress& progress) {
  const OptConfig& config = runner.config();
  const int64_t window_tokens = static_cast<int64_t>(windows.front().size());
  const size_t wanted = std::clamp<size_t>(tokens_per_run / window_tokens, 1, windows.size());
  const size_t wanted_loud = std::max<size_t>(1, wanted / 4);
  Loudness loudness(config.layers, config.ffn);
  DenseReference reference = [&] {
    const Observing observing(runner, &loudness);
    return DenseReference(runner, {windows.begin(), windows.begin() + static_cast<ptrdiff_t>(wanted)});
  }();
  const double work = static_cast<double>(config.layers) * static_cast<double>(wanted + loud * wanted_loud);
  double done = 0.0;
  std::vector<LayerSensitivity> result;
  for (int32_t l = 0; l < config.layers; ++l) {
    const Matrix down = DownRows(runner.backend(), runner.weights().layers[l].mlp.down);
    const std::vector<float> mass_weight = FisherMasses(runner.backend(), down, fisher);
    std::vector<int32_t> order(config.ffn);
    std::iota(order.begin(), order.end(), 0);
    const auto mass_of = [&](int32_t j) { return loudness.squares[l][j] * mass_weight[j]; };
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return mass_of(a) > mass_of(b); });
    const int32_t loud_here = std::min(loud, config.ffn / 2);

    Dropper dropper(l, down, mass_weight);
    const Observing observing(runner, &dropper);
    const auto ratio = [&](std::vector<uint8_t> dropped, size_t tried) {
      dropper.Reset(std::move(dropped));
      const double kl = reference.Kl(tried);
      const double mass = dropper.mass / static_cast<double>(std::max<int64_t>(dropper.rows, 1));
      done += static_cast<double>(tried);
      return mass < kLeastMass ? 0.0f : static_cast<float>(kl / mass);
    };
    LayerSensitivity sensitivity;
    std::vector<uint8_t> rest(config.ffn, 1);
    for (int32_t i = 0; i < loud_here; ++i) rest[order[i]] = 0;
    sensitivity.common = std::max(1e-3f, ratio(rest, wanted));
    sensitivity.per_neuron.assign(config.ffn, sensitivity.common);
    for (int32_t i = 0; i < loud_here; ++i) {
      if (!progress(done / work)) return Stopped();
      std::vector<uint8_t> alone(config.ffn, 0);
      alone[order[i]] = 1;
      sensitivity.per_neuron[order[i]] = std::max(sensitivity.common, ratio(alone, wanted_loud));
    }
    const HeadMetric metric(runner.backend(), runner.weights().layers[l].out, fisher, config.heads);
    HeadDropper head_dropper(l, config.heads, metric);
    runner.model().set_observer(&head_dropper);
    const double kl = reference.Kl(wanted_loud);
    sensitivity.heads = std::max(
        1e-3f,
        static_cast<float>(kl / std::max(head_dropper.mass / static_cast<double>(head_dropper.rows), kLeastMass)));
    if (!progress(done / work)) return Stopped();
    result.push_back(std::move(sensitivity));
  }
  return result;
}

}  // namespace dejavu
