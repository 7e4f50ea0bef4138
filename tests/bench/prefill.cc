// `dejavu-bench prefill`: how fast prompts go through the model, against the arithmetic peak of this machine. A prompt
// goes through in one step, with the logits of its last token. The arithmetic peak of the CPU is probed beside every
// one.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/load/loaded_model.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/bench/bench_model.h"
#include "tests/bench/flags.h"
#include "tests/bench/probe.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

struct PrefillOptions : ModelFlags {
  std::vector<int> tokens = {16, 64, 128, 512};
  int repeats = 5;
  std::string json;
};

// A multiply-add counts as two. Attention: scores and values over the positions up to each token's own.
double Operations(const OptConfig& config, double tokens) {
  const double hidden = config.hidden, layer_weights = 4 * hidden * hidden + 2 * hidden * config.ffn;
  const double attention = 2 * hidden * tokens * (tokens + 1);
  return config.layers * (2 * layer_weights * tokens + attention) + 2.0 * config.vocab * config.embed;
}

class PrefillBench {
 public:
  PrefillBench(const PrefillOptions& options, BenchModel& model, ProgressLine& progress)
      : options_(options), model_(model), progress_(progress) {
    if (options.device != "cuda") probe_.emplace(options.threads);
  }

  // The figures of prompts of that length.
  nlohmann::json Run(int tokens) {
    const double gflop = 1e-9 * Operations(model_.runner().config(), tokens);
    std::vector<double> ms, shares;
    model_.Prefill(0, 0, tokens);  // warms up
    for (int repeat = 0; repeat < options_.repeats && !Interrupted(); ++repeat) {
      const double before = Probe();
      const double seconds = model_.Prefill(0, 0, tokens);
      ms.push_back(1e3 * seconds);
      if (probe_) {
        peaks_.push_back(0.5 * (before + Probe()));
        shares.push_back(gflop / seconds / peaks_.back());
      }
      progress_.Show(absl::StrCat(tokens, " tokens"), (repeat + 1.0) / options_.repeats);
    }
    if (Interrupted()) return {};
    nlohmann::json row = {{"model", options_.model},
                          {"synthetic", IsSynthetic(options_.model)},
                          {"dtype", WeightsName(model_.runner().weights().dtype())},
                          {"tokens", tokens},
                          {"ms", Median(ms)},
                          {"ms_least", Least(ms)},
                          {"ms_most", Most(ms)},
                          {"samples_ms", ms},
                          {"tokens_per_s", 1e3 * tokens / Median(ms)},
                          {"gflop_per_s", 1e3 * gflop / Median(ms)}};
    if (probe_) row["peak_share"] = Median(shares);
    return row;
  }

  // GFLOP/s of the CPU, empty where a GPU computes.
  const std::vector<double>& peaks() const { return peaks_; }

 private:
  double Probe() { return probe_ ? probe_->Measure() : 0.0; }

  const PrefillOptions& options_;
  BenchModel& model_;
  ProgressLine& progress_;
  std::optional<ArithmeticProbe> probe_;
  std::vector<double> peaks_;
};

void Print(const PrefillOptions& options, ModelRunner& runner, const nlohmann::json& rows) {
  const bool on_device = options.device == "cuda";
  if (!runner.synthetic().empty()) std::printf("SYNTHETIC: %s\n", runner.synthetic().c_str());
  std::printf("%s, %s weights, %s, %d repeats\n\n%7s %10s %10s %10s %10s %10s %8s\n", options.model.c_str(),
              WeightsName(runner.weights().dtype()), runner.backend().Description().c_str(), options.repeats, "tokens",
              "ms", "least", "most", "tokens/s", "GFLOP/s", on_device ? "" : "/ peak");
  for (const nlohmann::json& row : rows) {
    std::printf("%7d %10.2f %10.2f %10.2f %10.1f %10.1f", row["tokens"].get<int>(), row["ms"].get<double>(),
                row["ms_least"].get<double>(), row["ms_most"].get<double>(), row["tokens_per_s"].get<double>(),
                row["gflop_per_s"].get<double>());
    if (!on_device) std::printf(" %7.1f%%", 100 * row["peak_share"].get<double>());
    std::printf("\n");
  }
}

absl::Status Report(const PrefillOptions& options, ModelRunner& runner, nlohmann::json rows,
                    const std::vector<double>& peaks) {
  Print(options, runner, rows);
  nlohmann::json json = {{"backend", runner.backend().Description()}, {"rows", std::move(rows)}};
  if (!peaks.empty()) {
    std::printf("\nPeak of float32 multiply-adds, probed in between: %.1f GFLOP/s (%.1f to %.1f)\n", Median(peaks),
                Least(peaks), Most(peaks));
    json["peak_gflop_per_s"] = Median(peaks);
    json["peak_spread"] = Spread(peaks);
    json["noisy"] = Spread(peaks) > kNoisySpread;
  }
  return WriteJson(options.json, json);
}

absl::Status Bench(const PrefillOptions& options) {
  StopOnInterrupt();
  RETURN_IF_ERROR(CheckWritable(options.json));
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  ModelRunner::Options run = RunnerOptions(options);
  run.window = run.max_rows = *std::max_element(options.tokens.begin(), options.tokens.end());
  if (run.window > config.context) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tokens ", run.window, " does not fit the model's context of ", config.context));
  }
  ProgressLine progress("dejavu-bench");
  ASSIGN_OR_RETURN(const auto model, BenchModel::Create(run, "", progress));
  PrefillBench bench(options, *model, progress);
  nlohmann::json rows = nlohmann::json::array();
  for (const int tokens : options.tokens) {
    rows.push_back(bench.Run(tokens));
    if (Interrupted()) return absl::CancelledError("interrupted");
  }
  return Report(options, model->runner(), std::move(rows), bench.peaks());
}

}  // namespace

Subcommand AddPrefill(CLI::App& program) {
  const auto options = std::make_shared<PrefillOptions>();
  CLI::App* const command = AddMeasuring(program, "prefill", "How fast prompts go through a model", *options);
  AddModel(command, *options);
  command->add_option("--tokens", options->tokens, "Lengths of the prompts, such as 16,64,128,512")
      ->delimiter(',')
      ->check(CLI::Range(2, 1 << 20));
  return {command, [options] { return ExitCode(Bench(*options)); }};
}

}  // namespace dejavu
