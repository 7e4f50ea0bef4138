#include "engine/calibration/calibrator.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/calibration/calibration_state.h"
#include "engine/calibration/fisher.h"
#include "engine/calibration/report.h"
#include "engine/calibration/sample_collector.h"
#include "engine/calibration/sensitivity.h"
#include "engine/calibration/tier_tuner.h"
#include "engine/calibration/window.h"
#include "engine/eval/evaluation.h"
#include "engine/ranks/model_runner.h"
#include "kernels/base/mutex.h"
#include "kernels/base/processors.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/cpu_backend.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

// Where the search for each tier's exchange rate between nats and bytes starts.
constexpr double kFirstMus[] = {10.0, 3.0, 1.3};
constexpr int64_t kTokens = 49152, kTokensOfWideModels = 16384;
constexpr int32_t kWideModel = 1024;
constexpr int64_t kSensitivityTokens = 4096;
constexpr int32_t kLoudNeurons = 8;

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

std::string NamesOf(const std::vector<int32_t>& layers) {
  return layers.size() == 1 ? absl::StrCat("layer ", layers.front())
                            : absl::StrCat("layers ", layers.front(), " to ", layers.back());
}

// What the tiers' operating points did on the validation text.
void NotePoints(const Evaluation& evaluation, PredictorData* data) {
  // NaN where no neuron was active at all.
  const auto share = [](double value) { return value >= 0.0 ? std::min(value, 1.0) : 0.0; };
  for (const TierEvaluation& t : evaluation.tiers) {
    for (size_t l = 0; l < data->layers.size(); ++l) {
      auto& point = data->layers[l].neurons.points[static_cast<size_t>(t.tier)];
      if (!point.has_value()) continue;
      point->missed_mass = share(t.layers[l].missed_mass);
      point->missed_share = share(t.layers[l].missed_share);
      point->density = share(t.layers[l].mlp_selected);
    }
  }
}

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
  std::vector<LayerSample> EmptySamples(size_t count) const;
  absl::StatusOr<std::vector<LayerSample>> Collect(const std::vector<int32_t>& layers);
  LayerProblem ProblemOf(Backend& backend, int32_t layer) const;
  FitOptions OptionsOfFit() const;
  absl::Status FitGroup(const std::vector<int32_t>& layers, const std::vector<LayerSample>& samples);
  absl::Status FitLayers();
  LayerPredictorData Facts(Backend& backend, int32_t layer, const LayerSample& sample) const;
  std::string Settings() const;
  absl::Status Save() const;
  bool Load();

  const CalibrationOptions& options_;
  ModelRunner& runner_;
  const OptConfig& config_;
  const CalibrationProgress& progress_;
  Mutex mutex_;  // taken for each report of progress, and for what a fitted layer changes

  std::vector<Window> training_, validation_;
  CalibrationState state_;
};

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
  ASSIGN_OR_RETURN(state_.fisher, FisherInformation(runner_, first(tokens), ReportAs("Fisher information")));
  ASSIGN_OR_RETURN(state_.sensitivities, Sensitivities(runner_, state_.fisher, first(kSensitivityTokens), tokens, loud,
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
  const int threads = options_.threads > 0 ? options_.threads : DefaultThreads().count;
  return static_cast<int>(std::clamp<int64_t>((options_.memory_mib << 20) / 3 / FitBytes(), 1, threads));
}

int32_t Calibrator::LayersAtOnce() const {
  const int64_t hidden = config_.hidden;
  const int64_t tokens = static_cast<int64_t>(training_.size() + validation_.size()) * runner_.options().window;
  const int64_t bytes = tokens * hidden * 2 * 2 + 2 * hidden * hidden * static_cast<int64_t>(sizeof(float));
  const int64_t left = (options_.memory_mib << 20) - Workers() * FitBytes();
  return static_cast<int32_t>(std::clamp<int64_t>(left / bytes, 1, config_.layers));
}

std::vector<LayerSample> Calibrator::EmptySamples(size_t count) const {
  const int64_t hidden = config_.hidden, window = runner_.options().window;
  std::vector<LayerSample> samples(count);
  for (LayerSample& sample : samples) {
    for (HalfRows* rows : {&sample.taps, &sample.inputs}) {
      rows->Reserve(static_cast<int64_t>(training_.size()) * window, hidden);
    }
    for (HalfRows* rows : {&sample.validation_taps, &sample.validation_inputs}) {
      rows->Reserve(static_cast<int64_t>(validation_.size()) * window, hidden);
    }
    sample.tap_sum.assign(hidden, 0.0);
    sample.tap_tap = HostMatrix(hidden, hidden);
    sample.tap_input = HostMatrix(hidden, hidden);
  }
  return samples;
}

absl::StatusOr<std::vector<LayerSample>> Calibrator::Collect(const std::vector<int32_t>& layers) {
  std::vector<LayerSample> samples = EmptySamples(layers.size());
  std::vector<HeadMetric> metrics;
  if (options_.heads) {
    for (const int32_t l : layers) {
      metrics.emplace_back(runner_.backend(), runner_.weights().layers[l].out, state_.fisher, config_.heads);
    }
  }
  SampleCollector collector(runner_.backend(), options_.tap, layers, &samples, &metrics);
  const Observing observing(runner_, &collector);
  const double total = static_cast<double>(training_.size() + validation_.size());
  double done = 0.0;
  for (const auto* windows : {&training_, &validation_}) {
    collector.set_validation(windows == &validation_);
    for (const Window w : *windows) {
      if (!Report(absl::StrCat("reading for ", NamesOf(layers)), done / total)) return CalibrationStopped();
      RunWindow(runner_, w, /*wants_logits=*/false);
      done += 1.0;
    }
  }
  return samples;
}

LayerPredictorData Calibrator::Facts(Backend& backend, int32_t l, const LayerSample& sample) const {
  const MlpWeights& mlp = runner_.weights().layers[l].mlp;
  const HostMatrix down = DownRows(backend, mlp.down);
  LayerPredictorData facts;
  facts.tap = TapOfLayer(options_.tap, l);
  facts.worth.assign(config_.ffn, 0.0f);
  for (int64_t j = 0; j < down.rows; ++j) {
    for (int64_t c = 0; c < down.cols; ++c) facts.worth[j] += down.row(j)[c] * down.row(j)[c];
  }
  const int64_t rows = std::min<int64_t>(4096, sample.inputs.rows());
  std::vector<int64_t> active(config_.ffn, 0);
  HostMatrix x(1, config_.hidden), z(1, config_.ffn);
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

LayerProblem Calibrator::ProblemOf(Backend& backend, int32_t l) const {
  LayerProblem problem;
  problem.layers = config_.layers;
  problem.up = runner_.weights().layers[l].mlp.up;
  problem.down = DownRows(backend, runner_.weights().layers[l].mlp.down);
  problem.fisher = &state_.fisher;
  problem.sensitivity = state_.sensitivities[l].per_neuron;
  problem.common_sensitivity = state_.sensitivities[l].common;
  problem.heads = options_.heads ? config_.heads : 0;
  problem.head_sensitivity = state_.sensitivities[l].heads;
  return problem;
}

FitOptions Calibrator::OptionsOfFit() const {
  FitOptions fit;
  fit.method = options_.method;
  fit.ranks = RanksToTry(config_.hidden);
  fit.mus.assign(std::begin(kFirstMus), std::end(kFirstMus));
  if (!options_.train) fit.scan_epochs = fit.refine_epochs = 0.0;
  return fit;
}

// Several layers side by side. Each that is done goes into the state's file.
absl::Status Calibrator::FitGroup(const std::vector<int32_t>& layers, const std::vector<LayerSample>& samples) {
  const FitOptions fit = OptionsOfFit();
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
      LayerFit fitted = FitLayer(**backend, ProblemOf(**backend, l), samples[i], fit, [&](double share) {
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
      state_.fits[l] = std::move(fitted);
      state_.facts[l] = std::move(facts);
      done[i] = 1.0;
      saved.Update(Save());
    }
  };
  std::vector<std::thread> workers;
  for (int i = 1; i < std::min<int>(Workers(), count); ++i) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
  if (stopped) return CalibrationStopped();
  return saved;
}

// All that a finished layer depends on.
std::string Calibrator::Settings() const {
  return absl::StrCat(runner_.weights_hash(), " text ", options_.text_fingerprint, " window ", runner_.options().window,
                      " tokens ", training_.size(), "+", validation_.size(), " method ",
                      static_cast<int>(options_.method), " tap ", Name(options_.tap), " train ", options_.train,
                      " heads ", options_.heads, " version 1");
}

absl::Status Calibrator::Save() const {
  if (options_.state_file.empty()) return absl::OkStatus();
  return SaveState(state_, config_, Settings(), options_.state_file);
}

// A state that does not fit, or is damaged, is as good as none.
bool Calibrator::Load() {
  if (options_.state_file.empty()) return false;
  absl::StatusOr<CalibrationState> state = LoadState(config_, options_.tap, Settings(), options_.state_file);
  if (!state.ok()) return false;
  state_ = *std::move(state);
  return true;
}

absl::Status Calibrator::FitLayers() {
  std::vector<int32_t> pending;
  for (int32_t l = 0; l < config_.layers; ++l) {
    if (state_.facts[l].worth.empty()) pending.push_back(l);
  }
  const auto at_once = static_cast<size_t>(LayersAtOnce());
  for (size_t first = 0; first < pending.size(); first += at_once) {
    const std::vector<int32_t> layers(
        pending.begin() + static_cast<ptrdiff_t>(first),
        pending.begin() + static_cast<ptrdiff_t>(std::min(first + at_once, pending.size())));
    ASSIGN_OR_RETURN(const std::vector<LayerSample> samples, Collect(layers));
    RETURN_IF_ERROR(FitGroup(layers, samples));
  }
  return absl::OkStatus();
}

absl::StatusOr<PredictorData> Calibrator::Run() {
  if (!Load()) {
    state_.fits.resize(config_.layers);
    state_.facts.resize(config_.layers);
    RETURN_IF_ERROR(Sense());
    RETURN_IF_ERROR(Save());
  }
  RETURN_IF_ERROR(FitLayers());
  TierTuner tuner(runner_, state_, options_.tap, validation_, options_.kl_targets, ReportAs("meeting the targets"));
  ASSIGN_OR_RETURN(const std::vector<TierChoice> choices, tuner.Choose());
  PredictorData data = tuner.Assemble(choices);
  if (!Report("measuring", 0.0)) return CalibrationStopped();
  ASSIGN_OR_RETURN(const Evaluation evaluation, tuner.MeasureAll(data));
  NotePoints(evaluation, &data);
  const int64_t training_tokens = static_cast<int64_t>(training_.size()) * runner_.options().window;
  data.report_json = CalibrationJson(evaluation, data, choices, training_tokens);
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
