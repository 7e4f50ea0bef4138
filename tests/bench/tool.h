// What the subcommands of dejavu-bench have in common: medians, exit codes, --json.
#ifndef TESTS_BENCH_TOOL_H_
#define TESTS_BENCH_TOOL_H_

#include <chrono>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace dejavu {

using Clock = std::chrono::steady_clock;
double SecondsSince(Clock::time_point start);

// Of at least one value.
double Median(std::vector<double> values);
double Least(const std::vector<double>& values);
double Most(const std::vector<double>& values);
// What the middle four fifths of the values span, over the median: one value that went astray spoils nothing.
double Spread(std::vector<double> values);

// Says on stderr what went wrong. INVALID_ARGUMENT and NOT_FOUND: 2, other failures: 1.
int ExitCode(const absl::Status& status);

// Beyond this spread of the bandwidth the neighbours of this machine make its figures worthless.
inline constexpr double kNoisySpread = 0.15;
// One line about the bandwidth that a run found, with a warning where it moved too much.
void PrintBandwidth(const std::vector<double>& gb_per_s);

}  // namespace dejavu

#endif  // TESTS_BENCH_TOOL_H_
