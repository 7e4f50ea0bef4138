#include "tests/bench/speculation.h"

#include <algorithm>
#include <cstdio>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "engine/eval/speculation_runs.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/bench/bench_model.h"
#include "tests/bench/probe.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

SpeculationWays WaysOf(const SpeculationBenchOptions& options) {
  SpeculationWays ways;
  for (const std::string& name : options.tiers) ways.drafting.push_back(*ParseTier(name));
  ways.drafts = options.drafts;
  ways.auto_alone = options.auto_alone;
  return ways;
}

nlohmann::json Describe(const std::vector<SpeculationWay>& ways,
                        const std::vector<std::vector<SpeculationYield>>& results, size_t way, int batch) {
  const Tier tier = ways[way].tier;
  const size_t off = static_cast<size_t>(
      std::find_if(ways.begin(), ways.end(), [&](const SpeculationWay& w) { return w.tier == tier; }) - ways.begin());
  std::vector<double> speeds, gains;
  for (size_t i = 0; i < results[way].size(); ++i) {
    speeds.push_back(results[way][i].tokens_per_s());
    gains.push_back(results[way][i].tokens_per_s() / results[off][i].tokens_per_s());
  }
  const SpeculationYield& last = results[way].back();
  const Interval interval = MedianInterval(gains);
  return {{"batch", batch},
          {"way", ways[way].Name()},
          {"tokens_per_s", Median(speeds)},
          {"gain", Median(gains)},
          {"gain_low", interval.low},
          {"gain_high", interval.high},
          {"gain_least", Least(gains)},
          {"gain_most", Most(gains)},
          {"rounds", last.rounds},
          {"accepted_share", last.accepted_share()},
          {"tokens_per_round", last.tokens_per_round()}};
}

void PrintRow(const nlohmann::json& row) {
  const auto number = [&](const char* key) { return row.at(key).get<double>(); };
  std::printf("%5d %-18s %9.1f %7.3f %7.3f %7.3f %7.0f %8.1f%% %9.2f\n", row.at("batch").get<int>(),
              row.at("way").get<std::string>().c_str(), number("tokens_per_s"), number("gain"), number("gain_low"),
              number("gain_high"), number("rounds"), 100 * number("accepted_share"), number("tokens_per_round"));
}

}  // namespace

absl::Status BenchSpeculation(const SpeculationBenchOptions& options) {
  StopOnInterrupt();
  EngineOptions engine_options = EngineOptionsOf(options);
  engine_options.predictor = options.predictor;
  engine_options.draft_weights = options.draft_weights;
  const int most = *std::max_element(options.batches.begin(), options.batches.end());
  engine_options.scheduler.max_batch = std::max(most, engine_options.scheduler.max_batch);
  engine_options.kv.prefix_cache = true;  // prompts are computed once
  ProgressLine progress("dejavu-bench");
  ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                   BenchTokens(options.model, options.text, int64_t{most} * options.context));
  ASSIGN_OR_RETURN(const auto engine, Engine::Create(engine_options, 0, ShowProgress(progress, "loading")));
  ASSIGN_OR_RETURN(const auto probe, BandwidthProbe::Create(options.threads));
  const int new_tokens = options.steps > 0 ? options.steps : 96;
  std::vector<std::vector<int32_t>> prompts;
  for (int i = 0; i < most; ++i) {
    const auto first = tokens.begin() + int64_t{i} * options.context;
    prompts.emplace_back(first, first + options.context);
  }
  ASSIGN_OR_RETURN(const std::vector<SpeculationWay> ways, ListWays(WaysOf(options), *engine));
  std::vector<double> bandwidth;
  nlohmann::json rows = nlohmann::json::array();
  std::printf(
      "%s, %s weights, %s, %d repeats of %d tokens, temperature %g, drafts with %s weights, %s; low to high: 95 %% of "
      "the median\n\n%5s %-18s %9s %7s %7s %7s %7s %9s %9s\n",
      options.model.c_str(), engine->weight_type(), engine->backend_description().c_str(), options.repeats, new_tokens,
      options.temperature, engine->draft_weight_bytes() > 0 ? "int8" : "the same",
      options.text.empty() ? "random tokens" : options.text.c_str(), "batch", "way", "tokens/s", "/ off", "low", "high",
      "rounds", "right", "per round");
  for (const int batch : options.batches) {
    std::vector<std::vector<SpeculationYield>> results(ways.size());
    for (int repeat = -1; repeat < options.repeats; ++repeat) {  // one to warm up
      for (size_t i = 0; i < ways.size(); ++i) {
        const size_t w = repeat % 2 == 0 ? i : ways.size() - 1 - i;
        if (Interrupted()) return absl::CancelledError("interrupted");
        if (repeat >= 0) bandwidth.push_back(probe->Measure());
        // The same requests each time: other texts would be other numbers of drafts that are right.
        ASSIGN_OR_RETURN(const SpeculationYield result, RunWay(*engine, absl::MakeSpan(prompts).first(batch),
                                                               new_tokens, options.temperature, ways[w]));
        if (repeat >= 0) results[w].push_back(result);
      }
      progress.Show(absl::StrCat("batch ", batch), (repeat + 2.0) / (options.repeats + 1));
    }
    for (size_t w = 0; w < ways.size(); ++w) {
      rows.push_back(Describe(ways, results, w, batch));
      PrintRow(rows.back());
    }
  }
  PrintBandwidth(bandwidth);
  nlohmann::json json = BandwidthJson(bandwidth);
  json["backend"] = engine->backend_description();
  json["repeats"] = options.repeats;
  json["rows"] = std::move(rows);
  return WriteJson(options.json, json);
}

}  // namespace dejavu
