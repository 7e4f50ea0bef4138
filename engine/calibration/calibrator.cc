#include "engine/calibration/calibrator.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/calibration/sensitivity.h"
#include "engine/eval/evaluation.h"
#include "engine/formats/json_text.h"
#include "engine/formats/safetensors_writer.h"
#include "engine/ranks/model_runner.h"
#include "kernels/base/mutex.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/cpu_backend.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

constexpr Tier kTiers[] = {Tier::kHigh, Tier::kBalanced, Tier::kFast};
// Where the search for each tier's exchange rate between nats and bytes starts.
constexpr double kFirstMus[] = {10.0, 3.0, 1.3};
constexpr int64_t kTokens = 49152, kTokensOfWideModels = 16384;
constexpr int32_t kWideModel = 1024;
constexpr int64_t kSensitivityTokens = 4096;
constexpr int32_t kLoudNeurons = 8;
constexpr int kShiftRounds = 4;
constexpr double kLargestShift = 2.0;
constexpr double kCloseEnough = 0.08;
// Choosing heads takes two more operations a layer, which a saving must pay for.
constexpr double kLeastHeadSaving = 0.03;
constexpr char kStateKey[] = "dejavu.calibration";

absl::Status Stopped() { return absl::CancelledError("calibration was stopped"); }

// Keeps, of the layers of one group, what LayerSample wants.
class Collector final : public ModelObserver {
 public:
  Collector(Backend& backend, Tap tap, const std::vector<int32_t>& layers, std::vector<LayerSample>* samples,
            const std::vector<HeadMetric>* metrics)
      : dev_(backend), tap_(tap), layers_(layers), samples_(*samples), metrics_(*metrics) {}

  void set_validation(bool validation) { validation_ = validation; }

  void OnInput(int32_t layer, Tap at, Tensor x) override {
    if (TapOf(layer) == at) KeepTap(layer, x);
    if (tap_ == Tap::kPreviousLayer && at == Tap::kMlpNorm) KeepTap(layer + 1, x);
    if (at == Tap::kMlpNorm) KeepInput(layer, x);
  }

  void OnContext(int32_t layer, Tensor context) override {
    LayerSample* const sample = Of(layer);
    if (sample == nullptr || metrics_.empty()) return;
    const HeadMetric& metric = metrics_[static_cast<size_t>(sample - samples_.data())];
    std::vector<float>& masses = validation_ ? sample->validation_head_mass : sample->head_mass;
    for (int64_t r = 0; r < context.rows; ++r) {
      for (int32_t h = 0; h < metric.heads(); ++h) {
        masses.push_back(static_cast<float>(metric.Mass(h, context.row<float>(r))));
      }
    }
  }

 private:
  // Where the tap of `layer` is seen while that layer runs.
  Tap TapOf(int32_t layer) const { return layer == 0 && tap_ == Tap::kPreviousLayer ? Tap::kAttentionNorm : tap_; }
  LayerSample* Of(int32_t layer) {
    const auto found = std::find(layers_.begin(), layers_.end(), layer);
    return found == layers_.end() ? nullptr : &samples_[found - layers_.begin()];
  }
  static Matrix CopyOf(const Tensor& x) {
    Matrix m(x.rows, x.cols);
    for (int64_t r = 0; r < x.rows; ++r) std::copy_n(x.row<float>(r), x.cols, m.row(r));
    return m;
  }

  void KeepTap(int32_t layer, const Tensor& x) {
    LayerSample* const sample = Of(layer);
    if (sample == nullptr) return;
    HalfRows& rows = validation_ ? sample->validation_taps : sample->taps;
    for (int64_t r = 0; r < x.rows; ++r) rows.Append(x.row<float>(r));
    // The look-ahead tap is seen one layer early: it waits here for its own layer's input.
    if (!validation_) tap_now_[layer % 2] = CopyOf(x);
  }

  void KeepInput(int32_t layer, const Tensor& x) {
    LayerSample* const sample = Of(layer);
    if (sample == nullptr) return;
    HalfRows& rows = validation_ ? sample->validation_inputs : sample->inputs;
    for (int64_t r = 0; r < x.rows; ++r) rows.Append(x.row<float>(r));
    if (validation_) return;
    const Matrix& tap = tap_now_[layer % 2];
    const Matrix turned = Transposed(tap);
    Matrix product(tap.cols, tap.cols);
    const auto add = [&](const Tensor& with, Matrix* sum) {
      Multiply(dev_, turned.tensor(), with, product.tensor());
      for (size_t i = 0; i < product.values.size(); ++i) sum->values[i] += product.values[i];
    };
    add(tap.tensor(), &sample->tap_tap);
    add(x, &sample->tap_input);
    for (int64_t r = 0; r < tap.rows; ++r) {
      for (int64_t c = 0; c < tap.cols; ++c) sample->tap_sum[c] += tap.row(r)[c];
    }
    sample->tokens += tap.rows;
  }

  Backend& dev_;
  const Tap tap_;
  const std::vector<int32_t>& layers_;
  std::vector<LayerSample>& samples_;
  const std::vector<HeadMetric>& metrics_;  // as the samples; empty: heads are left alone
  bool validation_ = false;
  Matrix tap_now_[2];
};

// What is settled for a tier once the layers run together.
struct TierChoice {
  double shift = 0.0;  // added to the biases of its neurons
  bool heads = false;
  double bytes = 0.0;             // weights read per token
  double bytes_with_heads = 0.0;  // and what skipping heads at the same quality would make of them; 0: not tried
};

class Calibrator {
 public:
  Calibrator(const CalibrationOptions& options, ModelRunner& runner, const CalibrationProgress& progress)
      : options_(options), runner_(runner), config_(runner.config()), progress_(progress) {}

  absl::Status ChooseWindows(absl::Span<const int32_t> tokens);
  absl::StatusOr<PredictorData> Run();

 private:
  bool Report(absl::string_view name, double done) {
    MutexLock lock(mutex_);
    return progress_({name, done});
  }
  StepProgress ReportAs(absl::string_view name) {
    return [this, name](double done) { return Report(name, done); };
  }
  absl::Status Sense();
  int64_t FitBytes() const;
  int Workers() const;
  int32_t LayersAtOnce() const;
  absl::StatusOr<std::vector<LayerSample>> Collect(const std::vector<int32_t>& layers);
  absl::Status FitGroup(const std::vector<int32_t>& layers, const std::vector<LayerSample>& samples);
  LayerPredictorData Facts(Backend& backend, int32_t layer, const LayerSample& sample) const;
  PredictorData Assemble(const std::vector<TierChoice>& choices) const;
  absl::Status MeetTargets(std::vector<TierChoice>* choices);
  absl::Status TryHeads(std::vector<TierChoice>* choices);
  absl::StatusOr<Evaluation> Measure(const PredictorData& data, const std::vector<Tier>& tiers, bool all);
  std::string Settings() const;
  absl::Status SaveState();
  absl::Status LoadState();

  const CalibrationOptions& options_;
  ModelRunner& runner_;
  const OptConfig& config_;
  const CalibrationProgress& progress_;
  Mutex mutex_;

  std::vector<Window> training_, validation_;
  std::vector<int32_t> validation_tokens_, some_validation_tokens_;
  Matrix fisher_;
  std::vector<LayerSensitivity> sensitivities_;
  std::vector<LayerFit> fits_;             // [layers]
  std::vector<LayerPredictorData> facts_;  // [layers] worth and frequency
};

// Ranks that are worth trying: up to a quarter of the width, in steps that kernels like.
std::vector<int32_t> RanksToTry(int32_t hidden) {
  std::vector<int32_t> ranks;
  for (const double share : {1.0 / 32, 1.0 / 16, 3.0 / 32, 1.0 / 8, 3.0 / 16, 1.0 / 4}) {
    const int32_t rank = std::clamp(static_cast<int32_t>(std::lround(hidden * share / 8) * 8), 8, 384);
    if (rank < hidden && (ranks.empty() || rank > ranks.back())) ranks.push_back(rank);
  }
  if (ranks.empty()) ranks.push_back(hidden);
  return ranks;
}

// Training windows spread over the first three quarters of the text, validation over the last.
absl::Status Calibrator::ChooseWindows(absl::Span<const int32_t> tokens) {
  const int64_t window = runner_.options().window, all = static_cast<int64_t>(tokens.size()) / window;
  const int64_t for_training = all * 3 / 4, for_validation = all - for_training;
  if (for_training < 4 || for_validation < 2) {
    return absl::InvalidArgumentError(absl::StrCat("the text has ", tokens.size(),
                                                   " tokens; calibration needs at least ", 8 * window, " (windows of ",
                                                   window, ")"));
  }
  for (const int32_t id : tokens) {
    if (id < 0 || id >= config_.vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat("the text has token ", id, "; ids of this model are below ", config_.vocab));
    }
  }
  const int64_t wanted = options_.tokens > 0           ? options_.tokens
                         : config_.hidden > kWideModel ? kTokensOfWideModels
                                                       : kTokens;
  const auto spread = [&](int64_t first, int64_t there, int64_t count, std::vector<Window>* windows) {
    count = std::clamp<int64_t>(count, 1, there);
    for (int64_t i = 0; i < count; ++i) {
      windows->push_back(tokens.subspan((first + i * there / count) * window, window));
    }
  };
  spread(0, for_training, wanted / window, &training_);
  spread(for_training, for_validation, wanted / 6 / window, &validation_);
  for (size_t i = 0; i < validation_.size(); ++i) {
    const Window w = validation_[i];
    validation_tokens_.insert(validation_tokens_.end(), w.begin(), w.end());
    if (i % 2 == 0) some_validation_tokens_.insert(some_validation_tokens_.end(), w.begin(), w.end());
  }
  return absl::OkStatus();
}

absl::Status Calibrator::Sense() {
  const int64_t window = runner_.options().window;
  const auto first = [&](int64_t tokens) {
    const auto count = std::min<size_t>(training_.size(), static_cast<size_t>(std::max<int64_t>(1, tokens / window)));
    std::vector<Window> some;
    for (size_t i = 0; i < count; ++i) some.push_back(training_[i * training_.size() / count]);
    return some;
  };
  // Every layer costs some runs; for slow models these look at fewer tokens, and at no neurons one by one.
  const double weights =
      static_cast<double>(runner_.weights().bytes()) / static_cast<double>(SizeOf(runner_.weights().dtype()));
  const auto tokens = static_cast<int64_t>(std::clamp(kSensitivityTokens * 2e7 / weights, 512.0, 4096.0));
  const int32_t loud = tokens >= 2048 ? kLoudNeurons : 0;
  ASSIGN_OR_RETURN(fisher_, FisherInformation(runner_, first(tokens), ReportAs("Fisher information")));
  ASSIGN_OR_RETURN(sensitivities_, Sensitivities(runner_, fisher_, first(kSensitivityTokens), tokens, loud,
                                                 ReportAs("sensitivity of the layers")));
  return absl::OkStatus();
}

// What fitting a layer takes beside its sample: white taps, validation activations, the map's parameters with their
// moments, products for a few hundred tokens.
int64_t Calibrator::FitBytes() const {
  const int64_t window = runner_.options().window, hidden = config_.hidden, ffn = config_.ffn;
  const int64_t training = static_cast<int64_t>(training_.size()) * window;
  const int64_t validation = static_cast<int64_t>(validation_.size()) * window;
  const int64_t rank = RanksToTry(config_.hidden).back();
  const int64_t floats = training * hidden + validation * (hidden + ffn) + 4 * rank * (hidden + ffn) +
                         3 * hidden * ffn + 6 * hidden * hidden + 4 * 512 * ffn;
  return floats * static_cast<int64_t>(sizeof(float));
}

// Fitting side by side may take a third of the memory, samples the rest: reading them again costs more than a thread.
int Calibrator::Workers() const {
  const int threads = options_.threads > 0 ? options_.threads : static_cast<int>(std::thread::hardware_concurrency());
  return static_cast<int>(std::clamp<int64_t>((options_.memory_mib << 20) / 3 / FitBytes(), 1, std::max(threads, 1)));
}

int32_t Calibrator::LayersAtOnce() const {
  const int64_t hidden = config_.hidden;
  const int64_t tokens = static_cast<int64_t>(training_.size() + validation_.size()) * runner_.options().window;
  const int64_t bytes = tokens * hidden * 2 * 2 + 2 * hidden * hidden * static_cast<int64_t>(sizeof(float));
  const int64_t left = (options_.memory_mib << 20) - Workers() * FitBytes();
  return static_cast<int32_t>(std::clamp<int64_t>(left / bytes, 1, config_.layers));
}

std::string NamesOf(const std::vector<int32_t>& layers) {
  return layers.size() == 1 ? absl::StrCat("layer ", layers.front())
                            : absl::StrCat("layers ", layers.front(), " to ", layers.back());
}

absl::StatusOr<std::vector<LayerSample>> Calibrator::Collect(const std::vector<int32_t>& layers) {
  std::vector<LayerSample> samples(layers.size());
  const int64_t hidden = config_.hidden, window = runner_.options().window;
  std::vector<HeadMetric> metrics;
  for (size_t i = 0; i < layers.size(); ++i) {
    LayerSample& sample = samples[i];
    for (HalfRows* rows : {&sample.taps, &sample.inputs}) {
      rows->Reserve(static_cast<int64_t>(training_.size()) * window, hidden);
    }
    for (HalfRows* rows : {&sample.validation_taps, &sample.validation_inputs}) {
      rows->Reserve(static_cast<int64_t>(validation_.size()) * window, hidden);
    }
    sample.tap_sum.assign(hidden, 0.0);
    sample.tap_tap = Matrix(hidden, hidden);
    sample.tap_input = Matrix(hidden, hidden);
    if (options_.heads) {
      metrics.emplace_back(runner_.backend(), runner_.weights().layers[layers[i]].out, fisher_, config_.heads);
    }
  }
  Collector collector(runner_.backend(), options_.tap, layers, &samples, &metrics);
  runner_.model().set_observer(&collector);
  const double total = static_cast<double>(training_.size() + validation_.size());
  double done = 0.0;
  bool going = true;
  for (const auto* windows : {&training_, &validation_}) {
    collector.set_validation(windows == &validation_);
    for (const Window w : *windows) {
      going = going && Report(absl::StrCat("reading for ", NamesOf(layers)), done / total);
      if (!going) break;
      Batch& batch = runner_.StartBatch();
      for (size_t i = 0; i < w.size(); ++i) batch.AddRow(0, static_cast<int32_t>(i), w[i], /*wants_logits=*/false);
      runner_.Run();
      done += 1.0;
    }
  }
  runner_.model().set_observer(nullptr);
  if (!going) return Stopped();
  return samples;
}

LayerPredictorData Calibrator::Facts(Backend& backend, int32_t l, const LayerSample& sample) const {
  const MlpWeights& mlp = runner_.weights().layers[l].mlp;
  const Matrix down = DownRows(backend, mlp.down);
  LayerPredictorData facts;
  facts.tap = l == 0 && options_.tap == Tap::kPreviousLayer ? Tap::kAttentionNorm : options_.tap;
  facts.worth.assign(config_.ffn, 0.0f);
  for (int64_t j = 0; j < down.rows; ++j) {
    for (int64_t c = 0; c < down.cols; ++c) facts.worth[j] += down.row(j)[c] * down.row(j)[c];
  }
  const int64_t rows = std::min<int64_t>(4096, sample.inputs.rows());
  std::vector<int64_t> active(config_.ffn, 0);
  Matrix x(1, config_.hidden), z(1, config_.ffn);
  for (int64_t i = 0; i < rows; ++i) {
    sample.inputs.Copy(i * sample.inputs.rows() / rows, x.row(0));
    backend.Linear(z.tensor(), x.tensor(), mlp.up);
    for (int64_t j = 0; j < config_.ffn; ++j) active[j] += z.row(0)[j] > 0.0f;
  }
  for (const int64_t count : active) {
    facts.frequency.push_back(static_cast<float>(static_cast<double>(count) / static_cast<double>(rows)));
  }
  return facts;
}

absl::Status Calibrator::FitGroup(const std::vector<int32_t>& layers, const std::vector<LayerSample>& samples) {
  FitOptions fit;
  fit.method = options_.method;
  fit.ranks = RanksToTry(config_.hidden);
  fit.mus.assign(std::begin(kFirstMus), std::end(kFirstMus));
  if (!options_.train) fit.scan_epochs = fit.refine_epochs = 0.0;
  const auto count = static_cast<int32_t>(layers.size());
  const std::string part = absl::StrCat("fitting ", NamesOf(layers));
  std::atomic<int32_t> next{0};
  std::atomic<bool> stopped{false};
  std::vector<double> done(count, 0.0);
  absl::Status saved;
  const auto work = [&] {
    const auto backend = CreateCpuBackend({1, /*pin=*/false});
    CHECK(backend.ok()) << backend.status();
    for (int32_t i; (i = next.fetch_add(1)) < count && !stopped;) {
      const int32_t l = layers[i];
      LayerProblem problem;
      problem.layers = config_.layers;
      problem.up = runner_.weights().layers[l].mlp.up;
      problem.down = DownRows(**backend, runner_.weights().layers[l].mlp.down);
      problem.fisher = &fisher_;
      problem.sensitivity = sensitivities_[l].per_neuron;
      problem.common_sensitivity = sensitivities_[l].common;
      problem.heads = options_.heads ? config_.heads : 0;
      problem.head_sensitivity = sensitivities_[l].heads;
      LayerFit fitted = FitLayer(**backend, problem, samples[i], fit, [&](double share) {
        MutexLock lock(mutex_);
        done[i] = share;
        double sum = 0.0;
        for (const double d : done) sum += d;
        if (!progress_({part, sum / count})) stopped = true;
        return !stopped;
      });
      LayerPredictorData facts = Facts(**backend, l, samples[i]);
      MutexLock lock(mutex_);
      if (stopped) return;
      fits_[l] = std::move(fitted);
      facts_[l] = std::move(facts);
      done[i] = 1.0;
      saved.Update(SaveState());
    }
  };
  std::vector<std::thread> workers;
  for (int i = 1; i < std::min<int>(Workers(), count); ++i) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
  if (stopped) return Stopped();
  return saved;
}

PredictorData Calibrator::Assemble(const std::vector<TierChoice>& choices) const {
  PredictorData data;
  data.weights_hash = runner_.weights_hash();
  data.tap = options_.tap;
  data.tiers.assign(std::begin(kTiers), std::end(kTiers));
  data.layers = facts_;
  std::vector<double> shifts;
  for (const TierChoice& choice : choices) shifts.push_back(choice.shift);
  for (int32_t l = 0; l < config_.layers; ++l) {
    data.layers[l].neurons = Quantise(fits_[l].neurons, shifts, data.tiers);
    FloatSelector heads = fits_[l].heads;
    bool any = false;
    for (size_t i = 0; i < heads.points.size(); ++i) {
      if (!choices[i].heads) heads.points[i].rank = 0;
      any = any || heads.points[i].rank > 0;
    }
    if (any) data.layers[l].heads = Quantise(heads, std::vector<double>(choices.size(), 0.0), data.tiers);
  }
  data.report_json = "{}";
  return data;
}

// On `all` of the validation text or on half of it.
absl::StatusOr<Evaluation> Calibrator::Measure(const PredictorData& data, const std::vector<Tier>& tiers, bool all) {
  EvaluationOptions options;
  options.tiers = tiers;
  return Evaluate(runner_, &data, all ? validation_tokens_ : some_validation_tokens_, options, nullptr);
}

size_t IndexOf(Tier tier) {
  return static_cast<size_t>(std::find(std::begin(kTiers), std::end(kTiers), tier) - kTiers);
}

// The layers were fitted one by one; here they run together. A shift of all biases of a tier trades nats for bytes as a
// larger or smaller mu would: d log(mu) = d bias, and nats fall about in proportion to mu.
absl::Status Calibrator::MeetTargets(std::vector<TierChoice>* choices) {
  std::vector<Tier> open(std::begin(kTiers), std::end(kTiers));
  for (int round = 0; round < kShiftRounds && !open.empty(); ++round) {
    if (!Report("meeting the targets", static_cast<double>(round) / kShiftRounds)) return Stopped();
    ASSIGN_OR_RETURN(const Evaluation evaluation, Measure(Assemble(*choices), open, /*all=*/false));
    open.clear();
    for (const TierEvaluation& tier : evaluation.tiers) {
      if (!IsPredicted(tier.tier)) continue;
      const size_t i = IndexOf(tier.tier);
      TierChoice& choice = (*choices)[i];
      choice.bytes = tier.weight_bytes_per_token;
      const double off = std::log(std::max(tier.kl_nats, 1e-9) / options_.kl_targets[i]);
      if (std::fabs(off) < kCloseEnough) continue;
      choice.shift = std::clamp(choice.shift + off, -kLargestShift, kLargestShift);
      open.push_back(tier.tier);
    }
  }
  return absl::OkStatus();
}

// Skipping heads costs nats, which the neurons must make good with bytes of their own. Where that leaves a tier with
// clearly fewer bytes at the same quality, it skips heads.
absl::Status Calibrator::TryHeads(std::vector<TierChoice>* choices) {
  const bool possible =
      std::any_of(fits_.begin(), fits_.end(), [](const LayerFit& fit) { return !fit.heads.a.empty(); });
  if (!possible) return absl::OkStatus();
  std::vector<TierChoice> with = *choices;
  for (TierChoice& choice : with) choice.heads = true;
  RETURN_IF_ERROR(MeetTargets(&with));
  for (size_t i = 0; i < with.size(); ++i) {
    (*choices)[i].bytes_with_heads = with[i].bytes;
    if (with[i].bytes < (1.0 - kLeastHeadSaving) * (*choices)[i].bytes) (*choices)[i] = with[i];
  }
  return absl::OkStatus();
}

nlohmann::json ToReport(const Evaluation& evaluation, const PredictorData& data) {
  nlohmann::json tiers = nlohmann::json::array();
  for (const TierEvaluation& t : evaluation.tiers) {
    nlohmann::json layers = nlohmann::json::array();
    for (size_t l = 0; l < t.layers.size(); ++l) {
      const auto& point = data.layers[l].neurons.points[static_cast<size_t>(t.tier)];
      layers.push_back({{"rank", point.has_value() ? point->rank : 0},
                        {"mlp_selected", t.layers[l].mlp_selected},
                        {"mlp_active", t.layers[l].mlp_active},
                        {"mlp_byte_share", t.layers[l].mlp_byte_share},
                        {"recall", t.layers[l].recall},
                        {"precision", t.layers[l].precision},
                        {"missed_mass", t.layers[l].missed_mass}});
    }
    tiers.push_back({{"tier", std::string(Name(t.tier))},
                     {"perplexity_change", t.perplexity_change},
                     {"top1_agreement", t.top1_agreement},
                     {"kl_nats", t.kl_nats},
                     {"mlp_density", t.mean.mlp_density()},
                     {"mlp_selected", t.mean.mlp_selected},
                     {"mlp_active", t.mean.mlp_active},
                     {"head_density", t.mean.head_density},
                     {"mlp_byte_share", t.mean.mlp_byte_share},
                     {"recall", t.mean.recall},
                     {"precision", t.mean.precision},
                     {"missed_mass", t.mean.missed_mass},
                     {"byte_ceiling", t.byte_ceiling},
                     {"layers", std::move(layers)}});
  }
  return tiers;
}

// All that a finished layer depends on.
std::string Calibrator::Settings() const {
  return absl::StrCat(runner_.weights_hash(), " text ", options_.text_fingerprint, " window ", runner_.options().window,
                      " tokens ", training_.size(), "+", validation_.size(), " method ",
                      static_cast<int>(options_.method), " tap ", Name(options_.tap), " train ", options_.train,
                      " heads ", options_.heads, " version 1");
}

absl::Status Calibrator::SaveState() {
  if (options_.state_file.empty()) return absl::OkStatus();
  SafetensorsWriter writer;
  writer.Add("fisher", {fisher_.rows, fisher_.cols}, fisher_.values);
  nlohmann::json layers = nlohmann::json::object();
  for (int32_t l = 0; l < config_.layers; ++l) {
    writer.Add(absl::StrCat(l, ".sensitivity"), {config_.ffn}, sensitivities_[l].per_neuron);
    writer.Add(absl::StrCat(l, ".common"), {2}, std::vector<float>{sensitivities_[l].common, sensitivities_[l].heads});
    if (facts_[l].worth.empty()) continue;
    writer.Add(absl::StrCat(l, ".worth"), {config_.ffn}, facts_[l].worth);
    writer.Add(absl::StrCat(l, ".frequency"), {config_.ffn}, facts_[l].frequency);
    nlohmann::json& layer = layers[absl::StrCat(l)];
    for (const auto& [name, selector] : {std::pair{"neurons", &fits_[l].neurons}, {"heads", &fits_[l].heads}}) {
      nlohmann::json ranks = nlohmann::json::array();
      writer.Add(absl::StrCat(l, ".", name, ".a"), {selector->a.rows, selector->a.cols}, selector->a.values);
      writer.Add(absl::StrCat(l, ".", name, ".b"), {selector->b.rows, selector->b.cols}, selector->b.values);
      for (const FloatSelector::Point& point : selector->points) {
        writer.Add(absl::StrCat(l, ".", name, ".bias.", ranks.size()), {static_cast<int64_t>(point.bias.size())},
                   point.bias);
        ranks.push_back(point.rank);
      }
      layer[name] = std::move(ranks);
    }
  }
  return writer.Write(kStateKey, nlohmann::json{{"settings", Settings()}, {"layers", layers}}.dump(),
                      options_.state_file);
}

// A state that does not fit, or is damaged, is as good as none.
absl::Status Calibrator::LoadState() {
  if (options_.state_file.empty()) return absl::NotFoundError("no state");
  std::string text;
  ASSIGN_OR_RETURN(const TensorMap tensors, ReadSafetensorsHeader(options_.state_file, kStateKey, &text));
  ASSIGN_OR_RETURN(const nlohmann::json state, ParseJsonObject(text, options_.state_file));
  if (state.value("settings", "") != Settings()) return absl::NotFoundError("the state belongs to other settings");
  const auto read = [&](const std::string& name, std::vector<float>* values, Matrix* matrix) -> absl::Status {
    const auto found = tensors.find(name);
    if (found == tensors.end() || found->second.dtype != DType::kFloat32) return absl::DataLossError(name);
    const StoredTensor& tensor = found->second;
    if (matrix != nullptr && tensor.shape.size() == 2) *matrix = Matrix(tensor.shape[0], tensor.shape[1]);
    std::vector<float>& to = matrix != nullptr ? matrix->values : *values;
    to.resize(tensor.elements);
    return Checkpoint::Read(tensor, 0, tensor.elements, to.data());
  };
  Matrix fisher;
  std::vector<LayerSensitivity> sensitivities(config_.layers);
  std::vector<LayerFit> fits(config_.layers);
  std::vector<LayerPredictorData> facts(config_.layers);
  RETURN_IF_ERROR(read("fisher", nullptr, &fisher));
  for (int32_t l = 0; l < config_.layers; ++l) {
    std::vector<float> common;
    RETURN_IF_ERROR(read(absl::StrCat(l, ".sensitivity"), &sensitivities[l].per_neuron, nullptr));
    RETURN_IF_ERROR(read(absl::StrCat(l, ".common"), &common, nullptr));
    if (common.size() != 2) return absl::DataLossError("common");
    sensitivities[l].common = common[0];
    sensitivities[l].heads = common[1];
    const auto layer = state["layers"].find(absl::StrCat(l));
    if (layer == state["layers"].end()) continue;
    RETURN_IF_ERROR(read(absl::StrCat(l, ".worth"), &facts[l].worth, nullptr));
    RETURN_IF_ERROR(read(absl::StrCat(l, ".frequency"), &facts[l].frequency, nullptr));
    facts[l].tap = l == 0 && options_.tap == Tap::kPreviousLayer ? Tap::kAttentionNorm : options_.tap;
    for (const auto& [name, selector] : {std::pair{"neurons", &fits[l].neurons}, {"heads", &fits[l].heads}}) {
      RETURN_IF_ERROR(read(absl::StrCat(l, ".", name, ".a"), nullptr, &selector->a));
      RETURN_IF_ERROR(read(absl::StrCat(l, ".", name, ".b"), nullptr, &selector->b));
      for (const nlohmann::json& rank : (*layer)[name]) {
        FloatSelector::Point& point = selector->points.emplace_back();
        point.rank = rank.get<int32_t>();
        RETURN_IF_ERROR(read(absl::StrCat(l, ".", name, ".bias.", selector->points.size() - 1), &point.bias, nullptr));
      }
    }
  }
  fisher_ = std::move(fisher);
  sensitivities_ = std::move(sensitivities);
  fits_ = std::move(fits);
  facts_ = std::move(facts);
  return absl::OkStatus();
}

absl::StatusOr<PredictorData> Calibrator::Run() {
  if (!LoadState().ok()) {
    fits_.resize(config_.layers);
    facts_.resize(config_.layers);
    RETURN_IF_ERROR(Sense());
    RETURN_IF_ERROR(SaveState());
  }
  std::vector<int32_t> pending;
  for (int32_t l = 0; l < config_.layers; ++l) {
    if (facts_[l].worth.empty()) pending.push_back(l);
  }
  const auto at_once = static_cast<size_t>(LayersAtOnce());
  for (size_t first = 0; first < pending.size(); first += at_once) {
    const std::vector<int32_t> layers(
        pending.begin() + static_cast<ptrdiff_t>(first),
        pending.begin() + static_cast<ptrdiff_t>(std::min(first + at_once, pending.size())));
    ASSIGN_OR_RETURN(const std::vector<LayerSample> samples, Collect(layers));
    RETURN_IF_ERROR(FitGroup(layers, samples));
  }
  std::vector<TierChoice> choices(std::size(kTiers));
  RETURN_IF_ERROR(MeetTargets(&choices));
  RETURN_IF_ERROR(TryHeads(&choices));
  PredictorData data = Assemble(choices);
  if (!Report("measuring", 0.0)) return Stopped();
  ASSIGN_OR_RETURN(const Evaluation evaluation, Measure(data, data.tiers, /*all=*/true));
  for (const TierEvaluation& t : evaluation.tiers) {
    for (int32_t l = 0; l < config_.layers; ++l) {
      auto& point = data.layers[l].neurons.points[static_cast<size_t>(t.tier)];
      if (!point.has_value()) continue;
      // NaN where no neuron was active at all.
      const auto share = [](double value) { return value >= 0.0 ? std::min(value, 1.0) : 0.0; };
      point->missed_mass = share(t.layers[l].missed_mass);
      point->missed_share = share(t.layers[l].missed_share);
      point->density = share(t.layers[l].mlp_selected);
    }
  }
  nlohmann::json report;
  report["validation_tokens"] = evaluation.tokens;
  report["training_tokens"] = static_cast<int64_t>(training_.size()) * runner_.options().window;
  report["tiers"] = ToReport(evaluation, data);
  for (size_t i = 0; i < choices.size(); ++i) {
    if (choices[i].bytes_with_heads == 0.0) continue;
    report["heads"].push_back({{"tier", std::string(Name(kTiers[i]))},
                               {"skipped", choices[i].heads},
                               {"weight_bytes_per_token", choices[i].bytes},
                               {"weight_bytes_per_token_if_skipped", choices[i].bytes_with_heads}});
  }
  data.report_json = report.dump();
  return data;
}

}  // namespace

absl::StatusOr<PredictorData> Calibrate(const CalibrationOptions& options, absl::Span<const int32_t> tokens,
                                        const CalibrationProgress& progress) {
  ASSIGN_OR_RETURN(const OptConfig config, OptConfig::Load(options.model));
  ModelRunner::Options run;
  run.model = options.model;
  run.threads = options.threads;
  run.window = std::min(options.window, config.context);
  run.max_rows = run.window;
  run.max_audits = run.window;
  ASSIGN_OR_RETURN(const std::unique_ptr<ModelRunner> runner,
                   ModelRunner::Create(run, [&](int64_t done_bytes, int64_t total_bytes) {
                     return progress({"loading", static_cast<double>(done_bytes) / static_cast<double>(total_bytes)});
                   }));
  CalibrationOptions feasible = options;
  feasible.heads = options.heads && options.tap != Tap::kMlpNorm;  // the MLP's input comes after the heads
  Calibrator calibrator(feasible, *runner, progress);
  RETURN_IF_ERROR(calibrator.ChooseWindows(tokens));
  return calibrator.Run();
}

}  // namespace dejavu
