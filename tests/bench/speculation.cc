#include "tests/bench/speculation.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/bench/bench_model.h"
#include "tests/bench/probe.h"
#include "tests/bench/tool.h"
#include "tests/engine/serving/finish_sink.h"

namespace dejavu {
namespace {

class CountingSink final : public FinishSink {
 public:
  bool OnToken(const Token&) override { return true; }
  bool OnPromptToken(const Token&) override { return true; }
};

// How requests decode; the first of each tier is without speculation.
struct Way {
  Tier tier = Tier::kDense;
  SpeculationParams speculation;

  std::string Name() const {
    const SpeculationParams& s = speculation;
    const std::string of(dejavu::Name(tier));
    if (s.mode != SpeculationMode::kAlways) return absl::StrCat(of, " ", dejavu::Name(s.mode));
    return absl::StrCat(of, " ", s.lookup ? "lookup" : dejavu::Name(s.draft_tier), " ", s.most_tokens);
  }
};

struct Result {
  double tokens_per_s = 0.0;
  int64_t rounds = 0, tokens = 0, drafted = 0, accepted = 0;
};

class SpeculationBench {
 public:
  SpeculationBench(const SpeculationBenchOptions& options, Engine& engine, std::vector<int32_t> tokens)
      : options_(options), engine_(engine), tokens_(std::move(tokens)) {}

  int steps() const { return options_.steps > 0 ? options_.steps : 96; }

  // The same requests each time: other texts would be other numbers of drafts that are right.
  absl::StatusOr<Result> Measure(const Way& way, int batch) {
    std::vector<std::shared_ptr<CountingSink>> sinks;
    for (int i = 0; i < batch; ++i) {
      Request request;
      request.prompt.assign(tokens_.begin() + int64_t{i} * options_.context,
                            tokens_.begin() + int64_t{i + 1} * options_.context);
      request.max_new_tokens = steps();
      request.ignore_eos = true;
      request.sampling.temperature = options_.temperature;
      request.sampling.seed = static_cast<uint64_t>(i);
      request.sparsity.tier = way.tier;
      request.speculation = way.speculation;
      sinks.push_back(std::make_shared<CountingSink>());
      RETURN_IF_ERROR(engine_.Submit(std::move(request), sinks.back()).status());
    }
    Result result;
    SteadyTime first, last;
    for (const auto& sink : sinks) {
      const Finish finish = sink->WaitForFinish();
      RETURN_IF_ERROR(finish.status);
      first = std::max(first, finish.first_token);
      last = std::max(last, finish.finished);
      result.rounds += finish.speculation.rounds;
      result.tokens += finish.speculation.tokens;
      for (const DraftCounts& counts : finish.speculation.of_source) {
        result.drafted += counts.drafted;
        result.accepted += counts.accepted;
      }
    }
    // Prompts end in steps of their own, one after the other; what the early ones have got by then is little.
    result.tokens_per_s = batch * (steps() - 1) / Seconds(first, last);
    return result;
  }

 private:
  const SpeculationBenchOptions& options_;
  Engine& engine_;
  const std::vector<int32_t> tokens_;
};

std::vector<Way> WaysOf(const SpeculationBenchOptions& options, const Engine& engine) {
  std::vector<Way> ways;
  const auto add = [&](Tier tier, SpeculationMode mode, Tier draft, bool lookup, int most) {
    ways.push_back({tier, {mode, draft, lookup, most}});
  };
  std::vector<Tier> drafting;
  for (const Tier tier : engine.predictor().tiers) {
    const bool named = std::count(options.tiers.begin(), options.tiers.end(), std::string(Name(tier))) > 0;
    if (named || options.tiers.empty()) drafting.push_back(tier);
  }
  const SpeculationParams defaults;
  const Tier usual = drafting.empty() ? Tier::kDense : drafting.front();
  for (const Tier tier : {Tier::kDense, Tier::kExact}) {
    add(tier, SpeculationMode::kOff, usual, false, defaults.most_tokens);
    add(tier, SpeculationMode::kAuto, usual, true, defaults.most_tokens);
    if (options.auto_alone) continue;
    for (const int most : options.drafts) {
      for (const Tier draft : drafting) add(tier, SpeculationMode::kAlways, draft, false, most);
      add(tier, SpeculationMode::kAlways, Tier::kDense, true, most);
    }
  }
  return ways;
}

nlohmann::json Describe(const std::vector<Way>& ways, const std::vector<std::vector<Result>>& results, size_t way,
                        int batch) {
  const Tier tier = ways[way].tier;
  const size_t off = static_cast<size_t>(
      std::find_if(ways.begin(), ways.end(), [&](const Way& w) { return w.tier == tier; }) - ways.begin());
  std::vector<double> speeds, gains;
  for (size_t i = 0; i < results[way].size(); ++i) {
    speeds.push_back(results[way][i].tokens_per_s);
    gains.push_back(results[way][i].tokens_per_s / results[off][i].tokens_per_s);
  }
  const Result& last = results[way].back();
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
          {"accepted_share", last.drafted > 0 ? double(last.accepted) / double(last.drafted) : 0.0},
          {"tokens_per_round", last.rounds > 0 ? double(last.tokens) / double(last.rounds) : 1.0}};
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
  ASSIGN_OR_RETURN(std::vector<int32_t> tokens,
                   BenchTokens(options.model, options.text, int64_t{most} * options.context));
  ASSIGN_OR_RETURN(const auto engine, Engine::Create(engine_options, 0, ShowProgress(progress, "loading")));
  ASSIGN_OR_RETURN(const auto probe, BandwidthProbe::Create(options.threads));
  SpeculationBench bench(options, *engine, std::move(tokens));
  const std::vector<Way> ways = WaysOf(options, *engine);
  std::vector<double> bandwidth;
  nlohmann::json rows = nlohmann::json::array();
  std::printf(
      "%s, %s weights, %s, %d repeats of %d tokens, temperature %g, drafts with %s weights, %s; low to high: 95 %% of "
      "the median\n\n%5s %-18s %9s %7s %7s %7s %7s %9s %9s\n",
      options.model.c_str(), engine->weight_type(), engine->backend_description().c_str(), options.repeats,
      bench.steps(), options.temperature, options.draft_weights.c_str(),
      options.text.empty() ? "random tokens" : options.text.c_str(), "batch", "way", "tokens/s", "/ off", "low", "high",
      "rounds", "right", "per round");
  for (const int batch : options.batches) {
    std::vector<std::vector<Result>> results(ways.size());
    for (int repeat = -1; repeat < options.repeats; ++repeat) {  // one to warm up
      for (size_t i = 0; i < ways.size(); ++i) {
        const size_t w = repeat % 2 == 0 ? i : ways.size() - 1 - i;
        if (Interrupted()) return absl::CancelledError("interrupted");
        if (repeat >= 0) bandwidth.push_back(probe->Measure());
        ASSIGN_OR_RETURN(const Result result, bench.Measure(ways[w], batch));
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
