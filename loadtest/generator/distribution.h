// Lengths and shares that requests are drawn from, as flags name them. Immutable; any thread.
#ifndef LOADTEST_GENERATOR_DISTRIBUTION_H_
#define LOADTEST_GENERATOR_DISTRIBUTION_H_

#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dejavu {

// Numbers of tokens: "32", "uniform:8:64" (both ends included), "lognormal:MEDIAN:SIGMA:MOST".
class LengthDistribution {
 public:
  static absl::StatusOr<LengthDistribution> Parse(absl::string_view text);

  int32_t Draw(std::mt19937_64* random) const;
  int32_t most() const { return most_; }

 private:
  int32_t least_ = 1, most_ = 1;
  double mu_ = 0.0, sigma_ = 0.0;  // of the logarithm; sigma 0: uniform
};

// Names with their shares: "dense=1,balanced=3", or one name alone.
class Mix {
 public:
  static absl::StatusOr<Mix> Parse(absl::string_view text);

  const std::string& Draw(std::mt19937_64* random) const;
  const std::vector<std::pair<std::string, double>>& shares() const { return shares_; }

 private:
  std::vector<std::pair<std::string, double>> shares_;
  double total_ = 0.0;
};

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_DISTRIBUTION_H_
