// `dejavu-bench decode --speculation`: what speculation brings in an engine that serves. One thread.
#ifndef TESTS_BENCH_SPECULATION_H_
#define TESTS_BENCH_SPECULATION_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/eval/speculation_runs.h"
#include "tests/bench/flags.h"

namespace dejavu {

struct SpeculationBenchOptions : ModelFlags {
  std::string predictor, text, json;
  std::vector<int> batches;
  int context = 256;               // tokens of each prompt
  std::vector<std::string> tiers;  // that draft; empty: all that can be served
  std::vector<int> drafts = SpeculationWays().drafts;
  float temperature = 0.0f;
  std::string draft_weights = EngineOptions().draft_weights;  // as EngineOptions has it
  int steps = 0;                                              // new tokens of a request; 0: 96
  int repeats = 7;
  bool auto_alone = false;  // of the ways to speculate
};

// DENSE and EXACT without, with AUTO, and ALWAYS with each tier and number of drafts and with what is looked up, in
// turns, forth and back; ratios are formed within a repeat.
absl::Status BenchSpeculation(const SpeculationBenchOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_SPECULATION_H_
