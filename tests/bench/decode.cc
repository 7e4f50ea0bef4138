// Repeats take the tiers in turn, so that a neighbour's load on the machine meets all of them; ratios are formed within
// a repeat.
#include "tests/bench/decode.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/eval/tool.h"
#include "engine/model_runner.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

using Clock = std::chrono::steady_clock;

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Measured {
  Tier tier;
  std::vector<double> ms;        // per step, by repeat
  std::vector<double> to_dense;  // the same over DENSE's
  double mlp_density = 0.0;      // rows read by a step, up and down together
};

class DecodeBench {
 public:
  DecodeBench(ModelRunner& runner, const DecodeBenchOptions& options, const std::vector<int32_t>& tokens)
      : runner_(runner), options_(options), tokens_(tokens) {}

  // Keys and values of everything before the first decoded position.
  void Prefill(int batch) {
    for (int slot = 0; slot < batch; ++slot) {
      for (int position = 0; position < options_.context;) {
        Batch& rows = runner_.StartBatch();
        while (position < options_.context && rows.rows_left() > 0) {
          rows.AddRow(slot, position, TokenAt(slot, position), /*wants_logits=*/false);
          ++position;
        }
        runner_.Run();
      }
    }
  }

  // Milliseconds per step.
  double Decode(Tier tier, int batch, double* mlp_density) {
    SparsityParams sparsity;
    sparsity.tier = tier;
    double ms = 0.0;
    int64_t rows_read = 0;
    for (int step = 0; step < options_.steps; ++step) {
      Batch& rows = runner_.StartBatch();
      const int position = options_.context + step;
      for (int slot = 0; slot < batch; ++slot) {
        rows.AddDecodeRow(slot, position, TokenAt(slot, position), /*wants_logits=*/true, sparsity);
      }
      const Clock::time_point start = Clock::now();
      runner_.Run();
      ms += std::chrono::duration<double, std::milli>(Clock::now() - start).count();
      const StepCounts& counts = runner_.counts();
      for (int32_t l = 0; l < runner_.config().layers; ++l) {
        rows_read += counts.union_selected[l] + counts.union_down_of(l);
      }
    }
    *mlp_density = static_cast<double>(rows_read) /
                   (2.0 * options_.steps * runner_.config().layers * static_cast<double>(runner_.config().ffn));
    return ms / options_.steps;
  }

 private:
  int32_t TokenAt(int slot, int position) const {
    const size_t window = tokens_.size() / static_cast<size_t>(runner_.options().slots);
    return tokens_[slot * window + position];
  }

  ModelRunner& runner_;
  const DecodeBenchOptions& options_;
  const std::vector<int32_t>& tokens_;
};

absl::Status Bench(const DecodeBenchOptions& options) {
  const int largest = *std::max_element(options.batches.begin(), options.batches.end());
  ModelRunner::Options run;
  run.model = options.model;
  run.predictor = options.predictor;
  run.threads = options.threads;
  run.slots = largest;
  run.max_rows = std::max(64, largest);
  run.window = options.context + options.steps;
  ASSIGN_OR_RETURN(const auto runner, ModelRunner::Create(run, nullptr));
  ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, ReadTokens(options.model, options.text, 0));
  if (tokens.size() < static_cast<size_t>(run.window) * largest) {
    return absl::InvalidArgumentError(absl::StrCat(options.text, ": has ", tokens.size(), " tokens; ", largest,
                                                   " sequences of ", run.window, " need more"));
  }
  const PredictorData* const predictor = runner->predictor_data();
  std::vector<Tier> tiers = {Tier::kDense};
  for (const Tier tier : kAllTiers) {
    const bool served = !IsPredicted(tier) || (predictor != nullptr &&
                                               std::count(predictor->tiers.begin(), predictor->tiers.end(), tier) > 0);
    const bool wanted =
        options.tiers.empty() || std::count(options.tiers.begin(), options.tiers.end(), std::string(Name(tier))) > 0;
    if (wanted && !served) {
      if (!options.tiers.empty())
        return absl::FailedPreconditionError(absl::StrCat("no predictor for tier ", Name(tier)));
      continue;
    }
    if (wanted && tier != Tier::kDense) tiers.push_back(tier);
  }

  std::printf("%s\n%s, %s, context %d, %d steps, %d repeats\n\n", options.model.c_str(),
              runner->backend().Description().c_str(), Name(runner->weights().dtype()), options.context, options.steps,
              options.repeats);
  std::printf("%-6s %-10s %10s %10s %10s %10s %10s\n", "batch", "tier", "ms/step", "least", "most", "/ dense",
              "MLP rows");
  nlohmann::json rows = nlohmann::json::array();
  DecodeBench bench(*runner, options, tokens);
  for (const int batch : options.batches) {
    bench.Prefill(batch);
    std::vector<Measured> measured;
    for (const Tier tier : tiers) measured.push_back({tier, {}, {}, 0.0});
    for (int i = -1; i < options.repeats; ++i) {  // one repeat to warm up
      double dense = 0.0;
      for (Measured& m : measured) {
        const double ms = bench.Decode(m.tier, batch, &m.mlp_density);
        if (m.tier == Tier::kDense) dense = ms;
        if (i < 0) continue;
        m.ms.push_back(ms);
        m.to_dense.push_back(ms / dense);
      }
    }
    for (const Measured& m : measured) {
      std::printf("%-6d %-10s %10.4f %10.4f %10.4f %10.3f %9.1f%%\n", batch, std::string(Name(m.tier)).c_str(),
                  Median(m.ms), *std::min_element(m.ms.begin(), m.ms.end()),
                  *std::max_element(m.ms.begin(), m.ms.end()), Median(m.to_dense), 100.0 * m.mlp_density);
      rows.push_back({{"model", options.model},
                      {"synthetic", false},
                      {"dtype", Name(runner->weights().dtype())},
                      {"batch", batch},
                      {"context", options.context},
                      {"tier", std::string(Name(m.tier))},
                      {"ms_per_step", Median(m.ms)},
                      {"to_dense", Median(m.to_dense)},
                      {"mlp_density", m.mlp_density}});
    }
  }
  if (options.json.empty()) return absl::OkStatus();
  return WriteText(options.json, nlohmann::json{{"rows", std::move(rows)}}.dump(1) + "\n");
}

}  // namespace

int RunDecodeBench(const DecodeBenchOptions& options) {
  const absl::Status status = Bench(options);
  if (status.ok()) return 0;
  std::fprintf(stderr, "dejavu-bench: %s\n", std::string(status.message()).c_str());
  return 1;
}

}  // namespace dejavu
