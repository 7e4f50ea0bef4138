#include "engine/calibration/sensitivity.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

#include "engine/calibration/fisher.h"
#include "engine/calibration/softmax.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr double kDropShare = 0.1;
constexpr double kLeastMass = 1e-12;
constexpr float kLeastSensitivity = 1e-3f;

// Leaves out a share of some neurons' activations of one layer, at random, and gives back the mean of what is missing:
// a shift of every token alike is not what a predictor does.
class Dropper final : public ModelObserver {
 public:
  Dropper(int32_t layer, const HostMatrix& down, std::vector<float> mass_weight)
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
    HostMatrix missing(y.rows, hidden);
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
  const HostMatrix& down_;
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
      const absl::Span<const float> logits = RunWindow(runner_, window, /*wants_logits=*/true);
      HostMatrix p(static_cast<int64_t>(window.size()), vocab);
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

  // Mean KL(DENSE || the model as it runs now) over the first windows.
  double Kl(size_t windows) {
    const int64_t vocab = runner_.config().vocab;
    std::vector<float> scratch(vocab);
    double kl = 0.0;
    int64_t rows = 0;
    for (size_t w = 0; w < std::min(windows, windows_.size()); ++w) {
      const absl::Span<const float> logits = RunWindow(runner_, windows_[w], /*wants_logits=*/true);
      const HostMatrix& p = probabilities_[w];
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
  std::vector<HostMatrix> probabilities_;  // by window [tokens, vocab]
  std::vector<double> negentropies_;
};

// Measures one layer after the other.
class LayerProbe {
 public:
  LayerProbe(ModelRunner& runner, const HostMatrix& fisher, DenseReference& reference, const Loudness& loudness,
             size_t windows, int32_t loud, const StepProgress& progress)
      : runner_(runner),
        fisher_(fisher),
        reference_(reference),
        loudness_(loudness),
        windows_(windows),
        windows_of_loud_(std::max<size_t>(1, windows / 4)),
        loud_(loud),
        progress_(progress),
        work_(static_cast<double>(runner.config().layers) * static_cast<double>(windows + loud * windows_of_loud_)) {}

  absl::StatusOr<LayerSensitivity> Measure(int32_t l) {
    LayerSensitivity sensitivity;
    RETURN_IF_ERROR(MeasureNeurons(l, &sensitivity));
    const HeadMetric metric(runner_.backend(), runner_.weights().layers[l].out, fisher_, runner_.config().heads);
    HeadDropper dropper(l, runner_.config().heads, metric);
    const Observing observing(runner_, &dropper);
    const double kl = reference_.Kl(windows_of_loud_);
    const double mass = std::max(dropper.mass / static_cast<double>(dropper.rows), kLeastMass);
    sensitivity.heads = std::max(kLeastSensitivity, static_cast<float>(kl / mass));
    if (!Going()) return CalibrationStopped();
    return sensitivity;
  }

 private:
  bool Going() const { return progress_(done_ / work_); }

  // The layer's neurons, the loudest first.
  std::vector<int32_t> ByMass(int32_t l, const std::vector<float>& mass_weight) const {
    std::vector<int32_t> order(mass_weight.size());
    std::iota(order.begin(), order.end(), 0);
    const auto mass_of = [&](int32_t j) { return loudness_.squares[l][j] * mass_weight[j]; };
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return mass_of(a) > mass_of(b); });
    return order;
  }

  // Nats per mass of the neurons that are `dropped` [ffn] now and then.
  float NatsPerMass(Dropper& dropper, std::vector<uint8_t> dropped, size_t windows) {
    dropper.Reset(std::move(dropped));
    const double kl = reference_.Kl(windows);
    const double mass = dropper.mass / static_cast<double>(std::max<int64_t>(dropper.rows, 1));
    done_ += static_cast<double>(windows);
    return mass < kLeastMass ? 0.0f : static_cast<float>(kl / mass);
  }

  absl::Status MeasureNeurons(int32_t l, LayerSensitivity* sensitivity) {
    const int32_t ffn = runner_.config().ffn, loud = std::min(loud_, ffn / 2);
    const HostMatrix down = DownRows(runner_.backend(), runner_.weights().layers[l].mlp.down);
    const std::vector<float> mass_weight = FisherMasses(runner_.backend(), down, fisher_);
    const std::vector<int32_t> order = ByMass(l, mass_weight);
    Dropper dropper(l, down, mass_weight);
    const Observing observing(runner_, &dropper);
    std::vector<uint8_t> rest(ffn, 1);
    for (int32_t i = 0; i < loud; ++i) rest[order[i]] = 0;
    sensitivity->common = std::max(kLeastSensitivity, NatsPerMass(dropper, rest, windows_));
    sensitivity->per_neuron.assign(ffn, sensitivity->common);
    for (int32_t i = 0; i < loud; ++i) {
      if (!Going()) return CalibrationStopped();
      std::vector<uint8_t> alone(ffn, 0);
      alone[order[i]] = 1;
      sensitivity->per_neuron[order[i]] = std::max(sensitivity->common, NatsPerMass(dropper, alone, windows_of_loud_));
    }
    return absl::OkStatus();
  }

  ModelRunner& runner_;
  const HostMatrix& fisher_;
  DenseReference& reference_;
  const Loudness& loudness_;
  const size_t windows_, windows_of_loud_;
  const int32_t loud_;
  const StepProgress& progress_;
  const double work_;  // windows of all layers
  double done_ = 0.0;
};

}  // namespace

absl::StatusOr<std::vector<LayerSensitivity>> Sensitivities(ModelRunner& runner, const HostMatrix& fisher,
                                                            const std::vector<Window>& windows, int64_t tokens_per_run,
                                                            int32_t loud, const StepProgress& progress) {
  const OptConfig& config = runner.config();
  const int64_t window_tokens = static_cast<int64_t>(windows.front().size());
  const size_t wanted = std::clamp<size_t>(tokens_per_run / window_tokens, 1, windows.size());
  Loudness loudness(config.layers, config.ffn);
  DenseReference reference = [&] {
    const Observing observing(runner, &loudness);
    return DenseReference(runner, {windows.begin(), windows.begin() + static_cast<ptrdiff_t>(wanted)});
  }();
  LayerProbe probe(runner, fisher, reference, loudness, wanted, loud, progress);
  std::vector<LayerSensitivity> result;
  for (int32_t l = 0; l < config.layers; ++l) {
    ASSIGN_OR_RETURN(LayerSensitivity sensitivity, probe.Measure(l));
    result.push_back(std::move(sensitivity));
  }
  return result;
}

}  // namespace dejavu
