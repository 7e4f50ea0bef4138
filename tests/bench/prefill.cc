// A prompt goes through in one step, with the logits of its last token. The arithmetic peak of the CPU is probed beside
// every one.
#include "tests/bench/prefill.h"

#include <algorithm>
#include <cstdio>
#include <optional>

#include "absl/strings/str_cat.h"
#include "engine/load/loaded_model.h"
#include "engine/load/synthetic.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/bench/bench_model.h"
#include "tests/bench/probe.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

// A multiply-add counts as two. Attention: scores and values over the positions up to each token's own.
double Operations(const OptConfig& config, double tokens) {
  const double hidden = config.hidden, layer_weights = 4 * hidden * hidden + 2 * hidden * config.ffn;
  const double attention = 2 * hidden * tokens * (tokens + 1);
  return config.layers * (2 * layer_weights * tokens + attention) + 2.0 * config.vocab * config.embed;
}

absl::Status Bench(const PrefillBenchOptions& options) {
  StopOnInterrupt();
  RETURN_IF_ERROR(CheckWritable(options.json));
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  ModelRunner::Options run;
  run.model = options.model;
  run.weights = options.weights;
  run.device = options.device;
  run.threads = options.threads;
  run.pin = true;
  run.window = run.max_rows = *std::max_element(options.tokens.begin(), options.tokens.end());
  if (run.window > config.context) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tokens ", run.window, " does not fit the model's context of ", config.context));
  }
  ProgressLine progress("dejavu-bench");
  ASSIGN_OR_RETURN(const auto model, BenchModel::Create(run, "", progress));
  const bool on_device = options.device == "cuda";
  std::optional<ArithmeticProbe> probe;
  if (!on_device) probe.emplace(options.threads);

  nlohmann::json rows = nlohmann::json::array();
  std::vector<double> peaks;
  for (const int tokens : options.tokens) {
    const double gflop = 1e-9 * Operations(config, tokens);
    std::vector<double> ms, shares;
    model->Prefill(0, 0, tokens);  // warms up
    for (int repeat = 0; repeat < options.repeats; ++repeat) {
      const double before = on_device ? 0.0 : probe->Measure();
      const double seconds = model->Prefill(0, 0, tokens);
      ms.push_back(1e3 * seconds);
      if (!on_device) {
        peaks.push_back(0.5 * (before + probe->Measure()));
        shares.push_back(gflop / seconds / peaks.back());
      }
      progress.Show(absl::StrCat(tokens, " tokens"), (repeat + 1.0) / options.repeats);
      if (Interrupted()) return absl::CancelledError("interrupted");
    }
    rows.push_back({{"model", options.model},
                    {"synthetic", IsSynthetic(options.model)},
                    {"dtype", WeightsName(model->runner().weights().dtype())},
                    {"tokens", tokens},
                    {"ms", Median(ms)},
                    {"ms_least", Least(ms)},
                    {"ms_most", Most(ms)},
                    {"samples_ms", ms},
                    {"tokens_per_s", 1e3 * tokens / Median(ms)},
                    {"gflop_per_s", 1e3 * gflop / Median(ms)}});
    if (!on_device) rows.back()["peak_share"] = Median(shares);
  }

  const std::string& synthetic = model->runner().synthetic();
  if (!synthetic.empty()) std::printf("SYNTHETIC: %s\n", synthetic.c_str());
  std::printf("%s, %s weights, %s, %d repeats\n\n%7s %10s %10s %10s %10s %10s %8s\n", options.model.c_str(),
              WeightsName(model->runner().weights().dtype()), model->runner().backend().Description().c_str(),
              options.repeats, "tokens", "ms", "least", "most", "tokens/s", "GFLOP/s", on_device ? "" : "/ peak");
  for (const nlohmann::json& row : rows) {
    std::printf("%7d %10.2f %10.2f %10.2f %10.1f %10.1f", row["tokens"].get<int>(), row["ms"].get<double>(),
                row["ms_least"].get<double>(), row["ms_most"].get<double>(), row["tokens_per_s"].get<double>(),
                row["gflop_per_s"].get<double>());
    if (!on_device) std::printf(" %7.1f%%", 100 * row["peak_share"].get<double>());
    std::printf("\n");
  }
  nlohmann::json json = {{"backend", model->runner().backend().Description()}, {"rows", std::move(rows)}};
  if (!on_device) {
    std::printf("\nPeak of float32 multiply-adds, probed in between: %.1f GFLOP/s (%.1f to %.1f)\n", Median(peaks),
                Least(peaks), Most(peaks));
    json["peak_gflop_per_s"] = Median(peaks);
    json["peak_spread"] = Spread(peaks);
    json["noisy"] = Spread(peaks) > kNoisySpread;
  }
  return options.json.empty() ? absl::OkStatus() : WriteText(options.json, json.dump(1) + "\n");
}

}  // namespace

int RunPrefillBench(const PrefillBenchOptions& options) { return ExitCode(Bench(options)); }

}  // namespace dejavu
