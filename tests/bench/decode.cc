// `dejavu-bench decode`: what a decode step costs by tier, batch and context, without scheduler and server.
//
// A repeat takes DENSE and then the tiers in turn, with a probe of the bandwidth before, between and after, so that a
// neighbour's load on the machine meets all of them: shares of the bandwidth are formed from neighbouring pairs, ratios
// of tiers within a repeat. The parts of a step, on a GPU how long it waits between two steps, are timed in steps of
// their own.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/load/loaded_model.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "engine/model/weight_bytes.h"
#include "engine/serving/sampler.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/load_module.h"
#include "nlohmann/json.hpp"
#include "tests/bench/bench_model.h"
#include "tests/bench/device_probe.h"
#include "tests/bench/flags.h"
#include "tests/bench/probe.h"
#include "tests/bench/speculation.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

constexpr double kSecondsOfOneMeasurement = 0.5;
constexpr int kMostSteps = 128;     // where the number of steps is ours to choose
constexpr int kBreakdownSteps = 8;  // likewise
constexpr int kPrefillRows = 256;

struct DecodeOptions : ModelFlags {
  std::string predictor;  // as ModelOptions has it
  std::string text;       // what is decoded, teacher-forced: sparsity depends on it; empty: random tokens
  std::vector<int> batches = {1, 4};
  std::vector<int> contexts = {256};
  std::vector<std::string> tiers;  // empty: all that can be served; DENSE is always measured
  int steps = 0;                   // of one measurement; 0: as many as take half a second
  int repeats = 7;
  std::string json;
  bool speculation = false;  // BenchSpeculation instead
  std::vector<int> drafts = SpeculationBenchOptions().drafts;
  float temperature = 0.0f;
  std::string draft_weights = SpeculationBenchOptions().draft_weights;
  bool auto_alone = false;
};

SpeculationBenchOptions ForSpeculation(const DecodeOptions& o) {
  SpeculationBenchOptions options;
  static_cast<ModelFlags&>(options) = o;
  options.predictor = o.predictor;
  options.text = o.text;
  options.json = o.json;
  options.batches = o.batches;
  options.context = o.contexts.front();
  options.tiers = o.tiers;
  options.drafts = o.drafts;
  options.temperature = o.temperature;
  options.draft_weights = o.draft_weights;
  options.auto_alone = o.auto_alone;
  options.steps = o.steps;
  options.repeats = o.repeats;
  return options;
}

// Of the memory that the weights lie in, on the CPU or on a GPU.
class WeightMemoryProbe {
 public:
  static absl::StatusOr<WeightMemoryProbe> Create(const DecodeOptions& options) {
    WeightMemoryProbe probe;
    if (options.device == "cuda") {
      ASSIGN_OR_RETURN(const DejavuCudaModule* const module, cuda::LoadModule());
      ASSIGN_OR_RETURN(probe.device_, DeviceProbe::Create(module, 0));
    } else {
      ASSIGN_OR_RETURN(probe.cpu_, BandwidthProbe::Create(options.threads));
    }
    return probe;
  }

  double Measure() { return device_ != nullptr ? device_->Measure() : cpu_->Measure(); }  // GB/s
  const DeviceProbe* device() const { return device_.get(); }                             // nullptr on the CPU

 private:
  std::unique_ptr<BandwidthProbe> cpu_;
  std::unique_ptr<DeviceProbe> device_;
};

struct Cost {
  double ms = 0.0;             // per step
  double weight_bytes = 0.0;   // likewise
  double mlp_density = 0.0;    // rows read by a step, up and down together
  double bandwidth_share = 0;  // of what the probes before and after it found
};

// On the CPU the parts of a step, on a GPU what it spends in and between steps.
struct Breakdown {
  std::vector<std::pair<std::string, double>> ms;
  double barriers = 0.0;  // per step
  double device_ms = 0.0, gap_ms = 0.0;
};

struct Measured {
  Tier tier;
  std::vector<Cost> costs;  // by repeat
  Breakdown breakdown;

  template <typename Value>
  std::vector<double> All(Value&& value) const {
    std::vector<double> all;
    for (const Cost& cost : costs) all.push_back(value(cost));
    return all;
  }
};

class DecodeBench {
 public:
  DecodeBench(const DecodeOptions& options, BenchModel& model, WeightMemoryProbe& probe, ProgressLine& progress)
      : options_(options),
        model_(model),
        runner_(model.runner()),
        probe_(probe),
        progress_(progress),
        sampler_(runner_.config().vocab, runner_.config().vocab),
        token_counts_(runner_.config().vocab) {
    for (const LayerWeights& layer : runner_.weights().layers) layer_bytes_.emplace_back(layer, runner_.config());
  }

  std::vector<Measured> Run(const std::vector<Tier>& tiers, int batch, int context) {
    const std::string part = absl::StrCat("batch ", batch, ", context ", context);
    std::vector<Measured> measured;
    for (const Tier tier : tiers) measured.push_back({tier, {}, {}});
    const int steps = Steps(batch, context);
    for (int repeat = -1; repeat < options_.repeats && !Interrupted(); ++repeat) {  // one to warm up
      double before = Probe(repeat);
      for (Measured& m : measured) {
        Cost cost = Decode(m.tier, batch, context, steps);
        const double after = Probe(repeat);
        cost.bandwidth_share = cost.weight_bytes / (cost.ms * 1e6) / (0.5 * (before + after));
        before = after;
        if (repeat >= 0) m.costs.push_back(cost);
      }
      progress_.Show(part, (repeat + 2.0) / (options_.repeats + 1));
    }
    for (Measured& m : measured) {
      m.breakdown = options_.device == "cuda" ? FindGaps(m.tier, batch, context, steps)
                                              : TakeApart(m.tier, batch, context, std::min(steps, kBreakdownSteps));
    }
    return measured;
  }

  const std::vector<double>& bandwidth() const { return bandwidth_; }

 private:
  int Steps(int batch, int context) {
    if (options_.steps > 0) return options_.steps;
    const int most = std::min<int>(kMostSteps, runner_.options().window - context);
    for (int i = 0; i < 2; ++i) Decode(Tier::kDense, batch, context, 1);  // a GPU records the second one
    const double ms = Decode(Tier::kDense, batch, context, 1).ms;
    return static_cast<int>(std::clamp(std::round(kSecondsOfOneMeasurement * 1e3 / ms), 1.0, double(most)));
  }

  double Probe(int repeat) {
    const double gb_per_s = probe_.Measure();
    if (repeat >= 0) bandwidth_.push_back(gb_per_s);
    return gb_per_s;
  }

  void FillBatch(Tier tier, int batch, int position) {
    SparsityParams sparsity;
    sparsity.tier = tier;
    Batch& rows = runner_.StartBatch();
    for (int slot = 0; slot < batch; ++slot) {
      rows.AddDecodeRow(slot, position, model_.TokenAt(slot, position), /*wants_logits=*/true, sparsity);
    }
  }

  Cost Decode(Tier tier, int batch, int context, int steps) {
    Cost cost;
    for (int step = 0; step < steps; ++step) {
      FillBatch(tier, batch, context + step);
      const SteadyTime start = std::chrono::steady_clock::now();
      runner_.Run();
      cost.ms += 1e3 * SecondsSince(start) / steps;
      cost.weight_bytes += WeightBytes(tier, batch) / steps;
      cost.mlp_density += MlpDensity() / steps;
    }
    return cost;
  }

  // Of the last step: what was read, from the counts of what was selected. No keys and values.
  double WeightBytes(Tier tier, int batch) const {
    const StepCounts& counts = runner_.counts();
    const PredictorData* const predictor = IsPredicted(tier) ? runner_.predictor_data() : nullptr;
    int64_t bytes = BytesAfterLayers(runner_.weights()) + batch * EmbeddingBytes(runner_.weights());
    for (int32_t l = 0; l < runner_.config().layers; ++l) {
      const LayerBytes& layer = layer_bytes_[l];
      bytes += layer.rest + counts.union_heads[l] * layer.head + layer.down_bias;
      bytes += counts.union_selected[l] * layer.up_row + counts.union_down_of(l) * layer.down_row;
      if (predictor == nullptr) continue;
      const OptConfig& config = runner_.config();
      bytes += NeuronPredictorBytes(predictor->layers[l].neurons, tier, config.hidden, config.ffn);
      bytes += HeadPredictorBytes(predictor->layers[l].heads, tier, config.hidden, config.heads);
    }
    return static_cast<double>(bytes);
  }

  double MlpDensity() const {
    const StepCounts& counts = runner_.counts();
    int64_t rows = 0;
    for (int32_t l = 0; l < runner_.config().layers; ++l) rows += counts.union_selected[l] + counts.union_down_of(l);
    return static_cast<double>(rows) / (2.0 * runner_.config().layers * runner_.config().ffn);
  }

  // The steps' own time with the text's tokens; what is between them as an engine decodes: tokens are drawn on the
  // device, and it is told the next step while it runs this one.
  Breakdown FindGaps(Tier tier, int batch, int context, int steps) {
    steps = std::clamp(std::min(steps, runner_.options().window - context), 2, TimedBackend::kMostRuns);
    FillBatch(tier, batch, context);
    runner_.Decode(2);  // whatever is recorded has been
    FillBatch(tier, batch, context);
    Breakdown breakdown;
    model_.timed().StartRuns();
    runner_.Decode(steps);
    breakdown.gap_ms = Median(model_.timed().GapMs());
    model_.timed().StartRuns();
    for (int step = 0; step < steps; ++step) {
      FillBatch(tier, batch, std::min(context + step, runner_.options().window - 1));
      runner_.Run();
    }
    breakdown.device_ms = Median(model_.timed().RunMs());
    return breakdown;
  }

  Breakdown TakeApart(Tier tier, int batch, int context, int steps) {
    Breakdown breakdown;
    TimedBackend& timed = model_.timed();
    double sampling_s = 0.0;
    SamplingParams greedy;
    greedy.temperature = 0.0f;
    const BackendStats before = timed.stats();
    timed.Start();
    for (int step = 0; step < steps; ++step) {
      FillBatch(tier, batch, context + step);
      const absl::Span<const float> logits = runner_.Run();
      const SteadyTime start = std::chrono::steady_clock::now();
      for (int row = 0; row < batch; ++row) {
        sampler_.Sample(logits.data() + static_cast<int64_t>(row) * runner_.config().vocab, greedy, token_counts_, {},
                        step, /*with_logprob=*/false);
      }
      sampling_s += SecondsSince(start);
    }
    timed.Stop();
    const BackendStats after = timed.stats();
    const auto add = [&](const char* name, double seconds) { breakdown.ms.emplace_back(name, 1e3 * seconds / steps); };
    for (size_t i = 0; i < kStepParts; ++i) add(kStepPartNames[i], timed.seconds(static_cast<StepPart>(i)));
    add("sampling", sampling_s);
    add("barriers", 1e-9 * static_cast<double>(after.barrier_ns - before.barrier_ns));  // within the other parts
    breakdown.barriers = static_cast<double>(after.barriers - before.barriers) / steps;
    return breakdown;
  }

  const DecodeOptions& options_;
  BenchModel& model_;
  ModelRunner& runner_;
  WeightMemoryProbe& probe_;
  ProgressLine& progress_;
  Sampler sampler_;
  TokenCounts token_counts_;
  std::vector<LayerBytes> layer_bytes_;
  std::vector<double> bandwidth_;
};

// (dense time / tier time) / (dense bytes / tier bytes), by repeat.
std::vector<double> CeilingShares(const Measured& dense, const Measured& tier) {
  std::vector<double> shares;
  for (size_t i = 0; i < tier.costs.size(); ++i) {
    const Cost &d = dense.costs[i], &t = tier.costs[i];
    shares.push_back((d.ms / t.ms) / (d.weight_bytes / t.weight_bytes));
  }
  return shares;
}

std::vector<double> ToDense(const Measured& dense, const Measured& tier) {
  std::vector<double> ratios;
  for (size_t i = 0; i < tier.costs.size(); ++i) ratios.push_back(tier.costs[i].ms / dense.costs[i].ms);
  return ratios;
}

nlohmann::json Describe(const DecodeOptions& options, const ModelRunner& runner, const Measured& dense,
                        const Measured& m, int batch, int context) {
  const std::vector<double> ms = m.All([](const Cost& c) { return c.ms; });
  nlohmann::json row = {
      {"model", options.model},
      {"synthetic", IsSynthetic(options.model)},
      {"dtype", WeightsName(runner.weights().dtype())},
      {"batch", batch},
      {"context", context},
      {"tier", std::string(Name(m.tier))},
      {"ms_per_step", Median(ms)},
      {"ms_least", Least(ms)},
      {"ms_most", Most(ms)},
      {"samples_ms", ms},
      {"weight_bytes_per_step", std::llround(Median(m.All([](const Cost& c) { return c.weight_bytes; })))},
      {"gb_per_s", Median(m.All([](const Cost& c) { return c.weight_bytes / (c.ms * 1e6); }))},
      {"bandwidth_share", Median(m.All([](const Cost& c) { return c.bandwidth_share; }))},
      {"ceiling_share", Median(CeilingShares(dense, m))},
      {"to_dense", Median(ToDense(dense, m))},
      {"mlp_density", Median(m.All([](const Cost& c) { return c.mlp_density; }))}};
  if (options.device == "cuda") {
    row["device_ms"] = m.breakdown.device_ms;
    row["gap_ms"] = m.breakdown.gap_ms;
    row["gap_share"] = m.breakdown.gap_ms / (m.breakdown.gap_ms + m.breakdown.device_ms);
  } else {
    for (const auto& [part, part_ms] : m.breakdown.ms) row["breakdown_ms"][part] = part_ms;
    row["barriers_per_step"] = m.breakdown.barriers;
  }
  return row;
}

void PrintHeading() {
  std::printf("%5s %7s %-9s %9s %9s %9s %9s %7s %7s %7s %8s %7s\n", "batch", "context", "tier", "ms/step", "least",
              "most", "MB/step", "GB/s", "/ bandw", "/ dense", "/ ceiling", "MLP");
}

void PrintRow(const nlohmann::json& row) {
  const auto number = [&](const char* key) { return row.at(key).get<double>(); };
  std::printf("%5d %7d %-9s %9.3f %9.3f %9.3f %9.1f %7.1f %6.1f%% %7.3f %8.1f%% %6.1f%%\n", row.at("batch").get<int>(),
              row.at("context").get<int>(), row.at("tier").get<std::string>().c_str(), number("ms_per_step"),
              number("ms_least"), number("ms_most"), number("weight_bytes_per_step") * 1e-6, number("gb_per_s"),
              100 * number("bandwidth_share"), number("to_dense"), 100 * number("ceiling_share"),
              100 * number("mlp_density"));
}

void PrintBreakdowns(const nlohmann::json& rows) {
  std::printf("\nWhere a step's time goes, in ms (barriers are within the other parts)\n%5s %7s %-9s", "batch",
              "context", "tier");
  for (const char* name : kStepPartNames) std::printf(" %11s", name);
  std::printf(" %9s %9s %9s\n", "sampling", "barriers", "number");
  for (const nlohmann::json& row : rows) {
    std::printf("%5d %7d %-9s", row.at("batch").get<int>(), row.at("context").get<int>(),
                row.at("tier").get<std::string>().c_str());
    const nlohmann::json& ms = row.at("breakdown_ms");
    for (const char* name : kStepPartNames) std::printf(" %11.3f", ms.at(name).get<double>());
    std::printf(" %9.3f %9.3f %9.0f\n", ms.at("sampling").get<double>(), ms.at("barriers").get<double>(),
                row.at("barriers_per_step").get<double>());
  }
}

void PrintGaps(const nlohmann::json& rows) {
  std::printf(
      "\nBy the GPU's clock: ms within a step, and from its end to the start of the next\n%5s %7s %-9s %9s %9s %9s\n",
      "batch", "context", "tier", "step", "gap", "of both");
  for (const nlohmann::json& row : rows) {
    std::printf("%5d %7d %-9s %9.3f %9.3f %8.1f%%\n", row.at("batch").get<int>(), row.at("context").get<int>(),
                row.at("tier").get<std::string>().c_str(), row.at("device_ms").get<double>(),
                row.at("gap_ms").get<double>(), 100 * row.at("gap_share").get<double>());
  }
}

// DENSE first, then those that were asked for.
absl::StatusOr<std::vector<Tier>> TiersOf(const DecodeOptions& options, const PredictorData* predictor) {
  std::vector<Tier> tiers = {Tier::kDense};
  for (const Tier tier : kAllTiers) {
    const bool named = std::count(options.tiers.begin(), options.tiers.end(), std::string(Name(tier))) > 0;
    if (named) RETURN_IF_ERROR(CheckServes(options.model, predictor, tier));
    const bool wanted = named || (options.tiers.empty() && Serves(predictor, tier));
    if (tier != Tier::kDense && wanted) tiers.push_back(tier);
  }
  return tiers;
}

absl::StatusOr<int> WindowOf(const DecodeOptions& options) {
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  const int longest = *std::max_element(options.contexts.begin(), options.contexts.end());
  const int steps = std::max(1, options.steps);
  if (longest + steps > config.context) {
    return absl::InvalidArgumentError(
        absl::StrCat("context ", longest, " and ", steps, " steps do not fit the model's context of ", config.context));
  }
  return options.steps > 0 ? longest + steps : std::min(longest + kMostSteps, config.context);
}

void Print(const DecodeOptions& options, ModelRunner& runner, const DeviceProbe* device, const nlohmann::json& rows) {
  std::printf("%s, %s weights, %s, %d repeats, %s\n\n", options.model.c_str(), WeightsName(runner.weights().dtype()),
              runner.backend().Description().c_str(), options.repeats,
              options.text.empty() ? "random tokens" : options.text.c_str());
  if (!runner.synthetic().empty()) std::printf("SYNTHETIC: %s\n\n", runner.synthetic().c_str());
  PrintHeading();
  for (const nlohmann::json& row : rows) PrintRow(row);
  if (device != nullptr) {
    PrintGaps(rows);
    std::printf("\n%s\n", device->Description().c_str());
  } else {
    PrintBreakdowns(rows);
  }
}

absl::Status Bench(const DecodeOptions& options) {
  StopOnInterrupt();
  RETURN_IF_ERROR(CheckWritable(options.json));
  ModelRunner::Options run = RunnerOptions(options);
  run.predictor = options.predictor;
  run.slots = *std::max_element(options.batches.begin(), options.batches.end());
  run.max_rows = std::max(kPrefillRows, run.slots);
  ASSIGN_OR_RETURN(run.window, WindowOf(options));
  ProgressLine progress("dejavu-bench");
  ASSIGN_OR_RETURN(const auto model, BenchModel::Create(run, options.text, progress));
  ModelRunner& runner = model->runner();
  ASSIGN_OR_RETURN(const std::vector<Tier> tiers, TiersOf(options, runner.predictor_data()));
  ASSIGN_OR_RETURN(WeightMemoryProbe probe, WeightMemoryProbe::Create(options));
  DecodeBench bench(options, *model, probe, progress);

  nlohmann::json rows = nlohmann::json::array();
  for (const int context : options.contexts) {
    model->FillContext(context, progress);
    for (const int batch : options.batches) {
      const std::vector<Measured> measured = bench.Run(tiers, batch, context);
      if (Interrupted()) return absl::CancelledError("interrupted");
      for (const Measured& m : measured) rows.push_back(Describe(options, runner, measured[0], m, batch, context));
    }
  }

  Print(options, runner, probe.device(), rows);
  PrintBandwidth(bench.bandwidth());
  nlohmann::json json = BandwidthJson(bench.bandwidth());
  json["backend"] = runner.backend().Description();
  json["repeats"] = options.repeats;
  json["rows"] = std::move(rows);
  if (probe.device() != nullptr) json["device"] = probe.device()->Describe();
  return WriteJson(options.json, json);
}

}  // namespace

Subcommand AddDecode(CLI::App& program) {
  const auto options = std::make_shared<DecodeOptions>();
  CLI::App* const command =
      AddMeasuring(program, "decode",
                   "What a decode step costs by tier, batch and context, and the weights that it reads", *options);
  AddModel(command, *options);
  command->add_option("--text", options->text, "Text that is decoded: sparsity depends on it; without: random tokens");
  AddPredictor(command, options->predictor);
  AddBatches(command, options->batches);
  command->add_option("--context", options->contexts, "Tokens before the first decoded one, such as 128,2048")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20));
  AddTiers(command, options->tiers, "Such as exact,balanced; DENSE always runs beside them");
  AddSteps(command, options->steps);
  command->add_flag("--speculation", options->speculation,
                    "Instead: tokens per second of an engine that guesses and checks, --tier says who guesses");
  command->add_option("--draft-tokens", options->drafts, "Of --speculation: guessed in a round, such as 2,4,6")
      ->delimiter(',')
      ->check(CLI::Range(1, kMostDraftTokens));
  command
      ->add_option("--draft-weights", options->draft_weights,
                   "Of --speculation: what tiers guess with; int8: attention and head once more")
      ->check(CLI::IsMember({kAutoDrafts, kStoredDrafts, kInt8Drafts}))
      ->capture_default_str();
  command->add_option("--temperature", options->temperature, "Of --speculation; 0: greedy")
      ->check(CLI::Range(0.0, 100.0));
  command->add_flag("--auto-alone", options->auto_alone, "Of --speculation: AUTO beside none, and nothing else");
  return {command, [options] {
            return ExitCode(options->speculation ? BenchSpeculation(ForSpeculation(*options)) : Bench(*options));
          }};
}

}  // namespace dejavu
