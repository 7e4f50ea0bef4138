#include "tests/bench/tool.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace dejavu {

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : 0.5 * (values[middle - 1] + values[middle]);
}

double Least(const std::vector<double>& values) { return *std::min_element(values.begin(), values.end()); }
double Most(const std::vector<double>& values) { return *std::max_element(values.begin(), values.end()); }

Interval MedianInterval(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  // That fewer than k + 1 of n lie on one side of the median: a binomial's tail.
  double term = std::pow(0.5, static_cast<double>(n)), tail = term;
  size_t k = 0;
  while (tail + term * static_cast<double>(n - k) / static_cast<double>(k + 1) <= 0.025) {
    term *= static_cast<double>(n - k) / static_cast<double>(k + 1);
    tail += term;
    ++k;
  }
  return {values[k], values[n - 1 - k]};
}

double Spread(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t tenth = values.size() / 10;
  return (values[values.size() - 1 - tenth] - values[tenth]) / Median(values);
}

double Quantile(const std::vector<double>& sorted, double share) {
  return sorted[static_cast<size_t>(share * static_cast<double>(sorted.size() - 1))];
}

LoadProgress ShowProgress(ProgressLine& line, const char* part) {
  return [&line, part](int64_t done_bytes, int64_t total_bytes) {
    line.Show(part, static_cast<double>(done_bytes) / static_cast<double>(total_bytes));
    return !Interrupted();
  };
}

int ExitCode(const absl::Status& status) {
  if (status.ok()) return kExitDone;
  std::fprintf(stderr, "dejavu-bench: %s\n", std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) || absl::IsNotFound(status) ? kExitUsage : kExitFailed;
}

absl::Status WriteJson(const std::string& path, const nlohmann::json& json) {
  return path.empty() ? absl::OkStatus() : WriteText(path, json.dump(1) + "\n");
}

void PrintBandwidth(const std::vector<double>& gb_per_s) {
  const double spread = Spread(gb_per_s);
  std::printf("\nRead bandwidth, probed %zu times in between: %.1f GB/s (%.1f to %.1f)\n", gb_per_s.size(),
              Median(gb_per_s), Least(gb_per_s), Most(gb_per_s));
  if (spread > kNoisySpread) {
    std::printf("NOISY: it moved by %.0f %%. Do not trust these figures; repeat them when the neighbours are quiet.\n",
                100 * spread);
  }
}

nlohmann::json BandwidthJson(const std::vector<double>& gb_per_s) {
  return {{"bandwidth_gb_per_s", Median(gb_per_s)},
          {"bandwidth_spread", Spread(gb_per_s)},
          {"noisy", Spread(gb_per_s) > kNoisySpread}};
}

}  // namespace dejavu
