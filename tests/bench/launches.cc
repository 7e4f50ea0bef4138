// `dejavu-bench launches`: what a decode step launches on a GPU, kind by kind: what each launch must read, what that
// takes at the speed at which the GPU reads, and what it takes alone and in the chain of the step.
//
// With --calculate nothing is measured and no GPU is needed: launches are those that the backend would make, and what
// is selected is what a synthetic model's profile expects.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/load_module.h"
#include "nlohmann/json.hpp"
#include "tests/bench/bench_model.h"
#include "tests/bench/device_probe.h"
#include "tests/bench/flags.h"
#include "tests/bench/launch_kinds.h"
#include "tests/bench/launch_times.h"
#include "tests/bench/launch_trace.h"
#include "tests/bench/planned_step.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

constexpr int kPrefillRows = 256;
constexpr int kProbes = 5;

struct LaunchesOptions : ModelFlags {
  std::string predictor;  // as ModelOptions has it
  std::vector<int> batches = {1};
  int context = 512;
  std::vector<std::string> tiers = {"dense"};
  bool calculate = false;
  double ceiling_gb_per_s = 4555;  // of an H200, as measured; where nothing is
  int repeats = 5;
  std::string json;
};

// What a report says of each step and of each kind of launch in it.
class Report {
 public:
  Report(const LaunchesOptions& options, int layers, const char* dtype, double ceiling_gb_per_s)
      : options_(options), layers_(layers), dtype_(dtype), ceiling_(ceiling_gb_per_s) {}

  // `found`: nullptr where it was calculated; `info` likewise.
  nlohmann::json Row(Tier tier, int batch, const LaunchKind& kind, const DejavuCudaKernel* info,
                     const LaunchTimes::Found* found) const {
    const auto launches = static_cast<double>(kind.places.size());
    const double bytes = static_cast<double>(kind.reads.bytes()) / launches;
    nlohmann::json row = Head(tier, batch);
    row["name"] = kind.name;
    row["launches_per_step"] = kind.places.size();
    row["launches_per_layer"] = kind.places.size() >= static_cast<size_t>(layers_) ? launches / layers_ : 0.0;
    row["grid"] = kind.shape.grid;
    row["block"] = kind.shape.block;
    row["dynamic_shared_bytes"] = kind.shape.shared_bytes;
    row["rows"] = kind.reads.rows;
    // Of one launch, on average.
    row["bytes"] = bytes;
    row["weight_bytes"] = static_cast<double>(kind.reads.weights) / launches;
    row["listed_bytes"] = static_cast<double>(kind.reads.listed) / launches;
    row["kv_bytes"] = static_cast<double>(kind.reads.keys_values) / launches;
    row["activation_bytes"] = static_cast<double>(kind.reads.activations) / launches;
    row["us_at_ceiling"] = UsOf(bytes);
    if (found == nullptr) return row;
    row["registers"] = info->registers;
    row["static_shared_bytes"] = info->shared_bytes;
    row["spilled_bytes"] = info->local_bytes;
    const double alone = Median(found->alone_us), chain = Median(found->chain_us);
    row["us_alone"] = alone;
    row["us_in_chain"] = chain;
    row["alone_bytes"] = found->alone_bytes;
    row["gb_per_s_alone"] = found->alone_bytes / alone * 1e-3;
    row["share_alone"] = UsOf(found->alone_bytes) / alone;
    if (chain <= 0.0) return row;  // it costs nothing that could be measured
    row["gb_per_s_in_chain"] = bytes / chain * 1e-3;
    row["share_in_chain"] = UsOf(bytes) / chain;
    return row;
  }

  // `step_us` 0: not measured.
  nlohmann::json Step(Tier tier, int batch, const std::vector<LaunchKind>& kinds, double step_us) const {
    size_t launches = 0, of_layers = 0;
    int64_t bytes = 0;
    for (const LaunchKind& kind : kinds) {
      launches += kind.places.size();
      if (kind.places.size() >= static_cast<size_t>(layers_)) of_layers += kind.places.size();
      bytes += kind.reads.bytes();
    }
    nlohmann::json step = Head(tier, batch);
    step["launches"] = launches;
    step["launches_per_layer"] = static_cast<double>(of_layers) / layers_;
    step["bytes"] = bytes;
    step["us_at_ceiling"] = UsOf(static_cast<double>(bytes));
    if (step_us == 0.0) return step;
    step["us"] = step_us;
    step["share"] = UsOf(static_cast<double>(bytes)) / step_us;
    return step;
  }

 private:
  nlohmann::json Head(Tier tier, int batch) const {
    return {{"model", options_.model},     {"dtype", dtype_},    {"batch", batch},
            {"context", options_.context}, {"tier", Name(tier)}, {"calculated", options_.calculate}};
  }
  double UsOf(double bytes) const { return bytes / ceiling_ * 1e-3; }

  const LaunchesOptions& options_;
  const int layers_;
  const char* const dtype_;
  const double ceiling_;
};

std::string Grid(const nlohmann::json& grid) {
  std::string text;
  for (const auto& size : grid) absl::StrAppend(&text, text.empty() ? "" : "x", size.get<int>());
  return text;
}

// A figure, or a dash where there is none.
std::string Figure(const nlohmann::json& row, const char* key, double unit, int digits) {
  if (!row.contains(key)) return "-";
  char text[32];
  std::snprintf(text, sizeof text, "%.*f", digits, row.at(key).get<double>() * unit);
  return text;
}

void PrintStep(const nlohmann::json& step, const nlohmann::json& rows) {
  std::printf("\n%s, batch %d, context %d: %d launches, %s a layer; %s MB, at the ceiling %s us",
              step.at("tier").get<std::string>().c_str(), step.at("batch").get<int>(), step.at("context").get<int>(),
              step.at("launches").get<int>(), Figure(step, "launches_per_layer", 1, 1).c_str(),
              Figure(step, "bytes", 1e-6, 1).c_str(), Figure(step, "us_at_ceiling", 1, 1).c_str());
  if (step.contains("us")) {
    std::printf("; takes %s us, %s %% of it", Figure(step, "us", 1, 1).c_str(), Figure(step, "share", 100, 1).c_str());
  }
  std::printf("\n%-28s %5s %5s %12s %6s %4s %7s %7s %4s %8s %8s %8s %8s %8s %8s %7s %6s %8s %7s %6s\n", "launch",
              "step", "layer", "grid", "block", "regs", "static", "dynamic", "rows", "MB", "weights", "listed", "KV",
              "us least", "us alone", "GB/s", "share", "us chain", "GB/s", "share");
  for (const nlohmann::json& row : rows) {
    if (row.at("tier") != step.at("tier") || row.at("batch") != step.at("batch")) continue;
    std::printf("%-28s %5d %5s %12s %6d %4s %7s %7d %4d %8s %8s %8s %8s %8s %8s %7s %6s %8s %7s %6s\n",
                row.at("name").get<std::string>().c_str(), row.at("launches_per_step").get<int>(),
                Figure(row, "launches_per_layer", 1, 1).c_str(), Grid(row.at("grid")).c_str(),
                row.at("block")[0].get<int>(), Figure(row, "registers", 1, 0).c_str(),
                Figure(row, "static_shared_bytes", 1, 0).c_str(), row.at("dynamic_shared_bytes").get<int>(),
                row.at("rows").get<int>(), Figure(row, "bytes", 1e-6, 3).c_str(),
                Figure(row, "weight_bytes", 1e-6, 3).c_str(), Figure(row, "listed_bytes", 1e-6, 3).c_str(),
                Figure(row, "kv_bytes", 1e-6, 3).c_str(), Figure(row, "us_at_ceiling", 1, 2).c_str(),
                Figure(row, "us_alone", 1, 2).c_str(), Figure(row, "gb_per_s_alone", 1, 0).c_str(),
                Figure(row, "share_alone", 1, 2).c_str(), Figure(row, "us_in_chain", 1, 2).c_str(),
                Figure(row, "gb_per_s_in_chain", 1, 0).c_str(), Figure(row, "share_in_chain", 1, 2).c_str());
  }
}

absl::Status Finish(const LaunchesOptions& options, nlohmann::json report) {
  for (const nlohmann::json& step : report.at("steps")) PrintStep(step, report.at("rows"));
  return WriteJson(options.json, report);
}

absl::StatusOr<std::vector<Tier>> TiersOf(const LaunchesOptions& options) {
  std::vector<Tier> tiers;
  for (const std::string& name : options.tiers) tiers.push_back(*ParseTier(name));
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  if (options.context < config.context) return tiers;
  return absl::InvalidArgumentError(
      absl::StrCat("context ", options.context, " and a step do not fit the model's context of ", config.context));
}

int MostRows(const LaunchesOptions& options) {
  return *std::max_element(options.batches.begin(), options.batches.end());
}

absl::Status Calculate(const LaunchesOptions& options, const std::vector<Tier>& tiers) {
  ASSIGN_OR_RETURN(const auto planned,
                   PlannedStep::Create(options.model, options.weights, MostRows(options), options.context));
  const Report report(options, planned->config().layers, WeightsName(planned->dtype()), options.ceiling_gb_per_s);
  nlohmann::json json = {{"ceiling_gb_per_s", options.ceiling_gb_per_s},
                         {"steps", nlohmann::json::array()},
                         {"rows", nlohmann::json::array()}};
  for (const int batch : options.batches) {
    for (const Tier tier : tiers) {
      const std::vector<LaunchKind> kinds = planned->Kinds(tier, batch);
      for (const LaunchKind& kind : kinds) json["rows"].push_back(report.Row(tier, batch, kind, nullptr, nullptr));
      json["steps"].push_back(report.Step(tier, batch, kinds, 0.0));
    }
  }
  std::printf("%s, %s weights: calculated, for a GPU that reads %.0f GB/s; nothing was run\n", options.model.c_str(),
              WeightsName(planned->dtype()), options.ceiling_gb_per_s);
  return Finish(options, std::move(json));
}

// The step, once it has been recorded and nothing moves any more.
std::vector<TracedLaunch> Trace(BenchModel& model, LaunchTrace& trace, Tier tier, int batch, int context) {
  SparsityParams sparsity;
  sparsity.tier = tier;
  const auto run = [&] {
    Batch& rows = model.runner().StartBatch();
    for (int slot = 0; slot < batch; ++slot) {
      rows.AddDecodeRow(slot, context, model.TokenAt(slot, context), /*wants_logits=*/true, sparsity);
    }
    rows.draws.assign(batch, {});  // what is most likely
    model.runner().Run();
  };
  run();  // as it is; the second time it is recorded
  run();
  return trace.Of(run);
}

absl::Status Measure(const LaunchesOptions& options, const std::vector<Tier>& tiers) {
  ASSIGN_OR_RETURN(const DejavuCudaModule* const module, cuda::LoadModule());
  LaunchTrace trace(module);
  ModelRunner::Options run = RunnerOptions(options);
  run.predictor = options.predictor;
  run.slots = MostRows(options);
  run.max_rows = std::max(kPrefillRows, run.slots);
  run.window = std::max(2, options.context + 1);
  run.wrap_backend = [&trace](std::unique_ptr<Backend> untraced) {
    untraced.reset();
    absl::StatusOr<std::unique_ptr<Backend>> traced = MakeCudaBackend(trace.module(), 0);
    if (!traced.ok()) throw std::runtime_error(std::string(traced.status().message()));
    return *std::move(traced);
  };
  ProgressLine progress("dejavu-bench");
  ASSIGN_OR_RETURN(const auto model, BenchModel::Create(run, /*text=*/"", progress));
  ModelRunner& runner = model->runner();
  for (const Tier tier : tiers) RETURN_IF_ERROR(CheckServes(options.model, runner.predictor_data(), tier));
  ASSIGN_OR_RETURN(const auto probe, DeviceProbe::Create(module, 0));
  std::vector<double> gb_per_s;
  for (int i = 0; i < kProbes; ++i) gb_per_s.push_back(probe->Measure());
  model->FillContext(options.context, progress);

  const Report report(options, runner.config().layers, WeightsName(runner.weights().dtype()), Median(gb_per_s));
  const WeightUses uses = UsesOf(runner.weights());
  nlohmann::json json = {{"device", probe->Describe()},
                         {"ceiling_gb_per_s", Median(gb_per_s)},
                         {"synthetic", runner.synthetic()},
                         {"steps", nlohmann::json::array()},
                         {"rows", nlohmann::json::array()}};
  for (const int batch : options.batches) {
    for (const Tier tier : tiers) {
      LaunchTimes times(trace, Trace(*model, trace, tier, batch, options.context));
      DeviceState state(trace);
      const std::vector<LaunchKind> kinds = KindsOf(times.step(), uses, state);
      std::vector<double> step_us;
      for (size_t i = 0; i < kinds.size(); ++i) {
        if (Interrupted()) return absl::CancelledError("interrupted");
        progress.Show(absl::StrCat(Name(tier), ", batch ", batch),
                      static_cast<double>(i) / static_cast<double>(kinds.size()));
        const LaunchTimes::Found found = times.Measure(kinds[i].places, options.repeats);
        step_us.insert(step_us.end(), found.step_us.begin(), found.step_us.end());
        DejavuCudaKernel info = {};
        module->kernel_info(trace.context(), kinds[i].shape.kernel, &info);
        json["rows"].push_back(report.Row(tier, batch, kinds[i], &info, &found));
      }
      json["steps"].push_back(report.Step(tier, batch, kinds, Median(step_us)));
    }
  }
  std::printf("%s, %s weights, %d repeats; the GPU reads %.0f GB/s\n%s\n", options.model.c_str(),
              WeightsName(runner.weights().dtype()), options.repeats, Median(gb_per_s), probe->Description().c_str());
  if (!runner.synthetic().empty()) std::printf("SYNTHETIC: %s\n", runner.synthetic().c_str());
  PrintBandwidth(gb_per_s);
  return Finish(options, std::move(json));
}

absl::Status Bench(const LaunchesOptions& options) {
  StopOnInterrupt();
  RETURN_IF_ERROR(CheckWritable(options.json));
  if (!options.calculate && options.device != "cuda") {
    return absl::InvalidArgumentError("the CPU backend launches nothing: --device cuda, or --calculate without a GPU");
  }
  ASSIGN_OR_RETURN(const std::vector<Tier> tiers, TiersOf(options));
  return options.calculate ? Calculate(options, tiers) : Measure(options, tiers);
}

}  // namespace

Subcommand AddLaunches(CLI::App& program) {
  const auto options = std::make_shared<LaunchesOptions>();
  CLI::App* const command = program.add_subcommand(
      "launches", "What a decode step launches on a GPU: bytes, and time alone and in the chain, by kind of launch");
  AddRepeats(command, options->repeats);
  AddJson(command, options->json);
  AddModel(command, *options);
  AddPredictor(command, options->predictor);
  AddBatches(command, options->batches);
  AddTiers(command, options->tiers, "Such as dense,exact,balanced");
  command->add_option("--context", options->context, "Tokens before the decoded one")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_flag("--calculate", options->calculate, "Of a synthetic model's shape alone; needs no GPU");
  command->add_option("--ceiling", options->ceiling_gb_per_s, "GB/s that the GPU reads, for --calculate")
      ->check(CLI::Range(1.0, 1e6))
      ->capture_default_str();
  return {command, [options] { return ExitCode(Bench(*options)); }};
}

}  // namespace dejavu
