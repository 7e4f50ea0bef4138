// The knee: the highest rate that a server was offered and held. One rule for a ramp, a sweep and the page.
#ifndef LOADTEST_GENERATOR_KNEE_H_
#define LOADTEST_GENERATOR_KNEE_H_

#include <optional>
#include <string>
#include <vector>

#include "loadtest/generator/document.h"

namespace dejavu {

constexpr double kWantedShare = 0.99;  // of the requests, that meet every objective

// Why this rate was not held; empty: it was. No request failed or was refused, kWantedShare of them met every
// objective, the p99 between tokens, of all tokens together, kept its target, and the run is valid.
std::vector<std::string> FallsShort(const Json& run);

// Runs of one label, model and kind of loop.
struct Series {
  std::string label, loop;
  std::vector<size_t> runs;           // by rising rate; of a closed loop by rising concurrency
  std::optional<size_t> knee;         // the last of them before the first that fell short; open loop only
  std::vector<std::string> ended_by;  // why that one fell short; empty: none did
};
std::vector<Series> FindSeries(const std::vector<Json>& runs);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_KNEE_H_
