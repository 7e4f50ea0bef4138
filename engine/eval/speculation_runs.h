// SpeculationRuns: requests of an engine that serves, without speculation and in every way to speculate, and what came
// of it. The tokens are the same in all ways. One thread.
#ifndef ENGINE_EVAL_SPECULATION_RUNS_H_
#define ENGINE_EVAL_SPECULATION_RUNS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/engine.h"
#include "engine/sparsity.h"
#include "engine/speculation.h"

namespace dejavu {

struct SpeculationWay {
  Tier tier = Tier::kDense;  // that checks
  SpeculationParams speculation;
  std::string Name() const;  // "dense high 4"
};

struct SpeculationWays {
  std::vector<Tier> drafting;  // those that draft; empty: all that the engine's predictor has
  std::vector<int> drafts = {2, 4, 6};
  bool auto_alone = false;  // no ways but AUTO
};
// DENSE and then EXACT: without, which comes first of each, with AUTO, and ALWAYS with each tier, and with what is
// looked up, for each number of drafts. FAILED_PRECONDITION for a tier that is not to be had.
absl::StatusOr<std::vector<SpeculationWay>> ListWays(const SpeculationWays& wanted, const Engine& engine);

struct SpeculationYield {
  double seconds = 0.0;                                       // from the last first token on
  int64_t new_tokens = 0;                                     // in that time, nearly
  int64_t rounds = 0, tokens = 0, drafted = 0, accepted = 0;  // `tokens` are those that rounds gave

  SpeculationYield& operator+=(const SpeculationYield& other);
  double tokens_per_s() const { return seconds > 0.0 ? static_cast<double>(new_tokens) / seconds : 0.0; }
  double accepted_share() const {
    return drafted > 0 ? static_cast<double>(accepted) / static_cast<double>(drafted) : 0.0;
  }
  double tokens_per_round() const {
    return rounds > 0 ? static_cast<double>(tokens) / static_cast<double>(rounds) : 1.0;
  }
};

// The prompts side by side, `new_tokens` of each, which goes on behind an end of text; each has a seed of its own.
absl::StatusOr<SpeculationYield> RunWay(Engine& engine, absl::Span<const std::vector<int32_t>> prompts, int new_tokens,
                                        float temperature, const SpeculationWay& way);

}  // namespace dejavu

#endif  // ENGINE_EVAL_SPECULATION_RUNS_H_
