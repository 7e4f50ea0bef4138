#include "engine/eval/speculation_evaluation.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"

namespace dejavu {

absl::StatusOr<SpeculationEvaluation> EvaluateSpeculation(Engine& engine, absl::Span<const int32_t> tokens,
                                                          const SpeculationEvaluationOptions& options,
                                                          const EvaluationProgress& progress) {
  const int64_t window = options.window, batches = static_cast<int64_t>(tokens.size()) / (window * options.batch);
  if (batches == 0) {
    return absl::InvalidArgumentError(absl::StrCat("the text has ", tokens.size(), " tokens; ", options.batch,
                                                   " windows of ", window, " side by side need ",
                                                   window * options.batch));
  }
  SpeculationEvaluation evaluation;
  evaluation.windows = batches * options.batch;
  evaluation.new_tokens = static_cast<int>(window - window / 2);
  ASSIGN_OR_RETURN(std::vector<SpeculationWay> listed, ListWays(options.ways, engine));
  for (SpeculationWay& way : listed) evaluation.ways.push_back({std::move(way), {}, 1.0});
  const auto ways = static_cast<int64_t>(evaluation.ways.size());
  for (int64_t b = 0; b < batches; ++b) {
    std::vector<std::vector<int32_t>> prompts;
    for (int i = 0; i < options.batch; ++i) {
      const auto prompt = tokens.subspan((b * options.batch + i) * window, window / 2);
      prompts.emplace_back(prompt.begin(), prompt.end());
    }
    for (int64_t i = 0; i < ways; ++i) {
      SpeculationEvaluation::OfWay& of = evaluation.ways[b % 2 == 0 ? i : ways - 1 - i];
      ASSIGN_OR_RETURN(const SpeculationYield yield,
                       RunWay(engine, prompts, evaluation.new_tokens, options.temperature, of.way));
      of.yield += yield;
      if (progress && !progress(b * ways + i + 1, batches * ways)) return absl::CancelledError("interrupted");
    }
  }
  for (SpeculationEvaluation::OfWay& of : evaluation.ways) {
    const auto off = std::find_if(evaluation.ways.begin(), evaluation.ways.end(),
                                  [&](const auto& other) { return other.way.tier == of.way.tier; });
    of.gain = off->yield.tokens_per_s() > 0.0 ? of.yield.tokens_per_s() / off->yield.tokens_per_s() : 1.0;
  }
  return evaluation;
}

std::string SpeculationJson(const SpeculationEvaluation& evaluation) {
  nlohmann::ordered_json json = {{"windows", evaluation.windows},
                                 {"new_tokens", evaluation.new_tokens},
                                 {"ways", nlohmann::ordered_json::array()}};
  for (const auto& [way, yield, gain] : evaluation.ways) {
    const SpeculationParams& s = way.speculation;
    const bool always = s.mode == SpeculationMode::kAlways;
    nlohmann::ordered_json of = {{"tier", std::string(Name(way.tier))}, {"mode", std::string(Name(s.mode))}};
    if (always) {
      of["drafts"] = s.lookup ? "lookup" : std::string(Name(s.draft_tier));
      of["draft_tokens"] = s.most_tokens;
    }
    of["rounds"] = yield.rounds;
    of["drafted"] = yield.drafted;
    of["accepted"] = yield.accepted;
    of["tokens_per_round"] = yield.tokens_per_round();
    of["tokens_per_s"] = yield.tokens_per_s();
    of["gain"] = gain;
    json["ways"].push_back(std::move(of));
  }
  return json.dump(2) + "\n";
}

std::string SpeculationTable(const SpeculationEvaluation& evaluation) {
  std::string table = absl::StrFormat("%-18s %8s %9s %9s %8s %10s %9s %7s\n", "way", "rounds", "drafted", "right",
                                      "share", "per round", "tokens/s", "/ off");
  for (const auto& [way, yield, gain] : evaluation.ways) {
    const std::string share = yield.drafted > 0 ? absl::StrFormat("%.1f %%", 100.0 * yield.accepted_share()) : "-";
    absl::StrAppendFormat(&table, "%-18s %8d %9d %9d %8s %10.2f %9.1f %7.3f\n", way.Name(), yield.rounds, yield.drafted,
                          yield.accepted, share, yield.tokens_per_round(), yield.tokens_per_s(), gain);
  }
  return table;
}

}  // namespace dejavu
