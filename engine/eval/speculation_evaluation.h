// EvaluateSpeculation: how often drafts are right on a text, by who drafts and how many tokens, and what that makes of
// the speed. One thread.
#ifndef ENGINE_EVAL_SPECULATION_EVALUATION_H_
#define ENGINE_EVAL_SPECULATION_EVALUATION_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/engine.h"
#include "engine/eval/evaluation.h"
#include "engine/eval/speculation_runs.h"

namespace dejavu {

struct SpeculationEvaluationOptions {
  SpeculationWays ways;
  int window = 256;  // tokens of the text that are taken at a time: half of them a prompt, and as many are generated
  int batch = 1;     // windows side by side
  float temperature = 0.0f;
};

struct SpeculationEvaluation {
  struct OfWay {
    SpeculationWay way;
    SpeculationYield yield;  // of all windows
    double gain = 1.0;       // of tokens per second, against the same tier without
  };
  int64_t windows = 0;
  int new_tokens = 0;  // of each
  std::vector<OfWay> ways;
};

// Only whole windows count, and as many as fill batches. All ways take turns with each batch, forth and back. The
// progress counts windows of ways. INVALID_ARGUMENT for too few tokens, CANCELLED where `progress` says false.
absl::StatusOr<SpeculationEvaluation> EvaluateSpeculation(Engine& engine, absl::Span<const int32_t> tokens,
                                                          const SpeculationEvaluationOptions& options,
                                                          const EvaluationProgress& progress);

std::string SpeculationJson(const SpeculationEvaluation& evaluation);
// A line of column heads and one for each way.
std::string SpeculationTable(const SpeculationEvaluation& evaluation);

}  // namespace dejavu

#endif  // ENGINE_EVAL_SPECULATION_EVALUATION_H_
