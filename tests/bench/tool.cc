#include "tests/bench/tool.h"

#include <algorithm>
#include <cstdio>

#include "engine/eval/tool.h"

namespace dejavu {

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : 0.5 * (values[middle - 1] + values[middle]);
}

double Least(const std::vector<double>& values) { return *std::min_element(values.begin(), values.end()); }
double Most(const std::vector<double>& values) { return *std::max_element(values.begin(), values.end()); }

double Spread(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t tenth = values.size() / 10;
  return (values[values.size() - 1 - tenth] - values[tenth]) / Median(values);
}

int ExitCode(const absl::Status& status) {
  if (status.ok()) return kExitDone;
  std::fprintf(stderr, "dejavu-bench: %s\n", std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) || absl::IsNotFound(status) ? kExitUsage : kExitFailed;
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

}  // namespace dejavu
