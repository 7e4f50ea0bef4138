// What the subcommands of dejavu-bench have in common: figures of repeated measurements, progress, exit codes, --json.
#ifndef TESTS_BENCH_TOOL_H_
#define TESTS_BENCH_TOOL_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/eval/tool.h"
#include "engine/load_progress.h"
#include "nlohmann/json.hpp"

namespace dejavu {

// Of at least one value.
double Median(std::vector<double> values);
double Least(const std::vector<double>& values);
double Most(const std::vector<double>& values);
// Where the median of what was drawn lies with at least 95 % (order statistics); of fewer than six values, all of them.
struct Interval {
  double low = 0.0, high = 0.0;
};
Interval MedianInterval(std::vector<double> values);
// What the middle four fifths of the values span, over the median: one value that went astray spoils nothing.
double Spread(std::vector<double> values);
// The value below which that share of the others lies.
double Quantile(const std::vector<double>& sorted, double share);

// Shows how much of `part` is done, until Ctrl-C. Both must outlive it.
LoadProgress ShowProgress(ProgressLine& line, const char* part);

// Says on stderr what went wrong. INVALID_ARGUMENT and NOT_FOUND: 2, other failures: 1.
int ExitCode(const absl::Status& status);

// What --json asks for; nothing where `path` is empty.
absl::Status WriteJson(const std::string& path, const nlohmann::json& json);

// Beyond this spread of the bandwidth the neighbours of this machine make its figures worthless.
inline constexpr double kNoisySpread = 0.15;
// One line about the bandwidth that a run found, with a warning where it moved too much.
void PrintBandwidth(const std::vector<double>& gb_per_s);
// The same for --json: bandwidth_gb_per_s, bandwidth_spread, noisy.
nlohmann::json BandwidthJson(const std::vector<double>& gb_per_s);

}  // namespace dejavu

#endif  // TESTS_BENCH_TOOL_H_
