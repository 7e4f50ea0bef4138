#include "loadtest/generator/distribution.h"

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace dejavu {
namespace {

constexpr int32_t kMostTokens = 1 << 20;

bool ParseTokens(absl::string_view text, int32_t* tokens) {
  return absl::SimpleAtoi(text, tokens) && *tokens >= 1 && *tokens <= kMostTokens;
}

}  // namespace

absl::StatusOr<LengthDistribution> LengthDistribution::Parse(absl::string_view text) {
  const std::vector<absl::string_view> parts = absl::StrSplit(text, ':');
  LengthDistribution d;
  if (parts.size() == 1 && ParseTokens(parts[0], &d.least_)) {
    d.most_ = d.least_;
    return d;
  }
  if (parts.size() == 3 && parts[0] == "uniform" && ParseTokens(parts[1], &d.least_) &&
      ParseTokens(parts[2], &d.most_) && d.least_ <= d.most_) {
    return d;
  }
  int32_t median = 0;
  if (parts.size() == 4 && parts[0] == "lognormal" && ParseTokens(parts[1], &median) &&
      absl::SimpleAtod(parts[2], &d.sigma_) && d.sigma_ > 0.0 && d.sigma_ <= 5.0 && ParseTokens(parts[3], &d.most_)) {
    d.mu_ = std::log(median);
    return d;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "'", text, "' is not N, uniform:LEAST:MOST or lognormal:MEDIAN:SIGMA:MOST with tokens of 1 to ", kMostTokens));
}

int32_t LengthDistribution::Draw(std::mt19937_64* random) const {
  if (sigma_ == 0.0) return std::uniform_int_distribution<int32_t>(least_, most_)(*random);
  const double drawn = std::lognormal_distribution<double>(mu_, sigma_)(*random);
  return static_cast<int32_t>(std::clamp(std::round(drawn), 1.0, static_cast<double>(most_)));
}

absl::StatusOr<Mix> Mix::Parse(absl::string_view text) {
  Mix mix;
  for (const absl::string_view entry : absl::StrSplit(text, ',')) {
    const std::vector<std::string> parts = absl::StrSplit(entry, '=');
    double share = 1.0;
    const bool named_alone = parts.size() == 1 && !absl::StrContains(text, ',');
    const bool shared = parts.size() == 2 && absl::SimpleAtod(parts[1], &share) && share > 0.0 && share <= 1e9;
    if (parts[0].empty() || !(named_alone || shared)) {
      return absl::InvalidArgumentError(absl::StrCat("'", entry, "' is not NAME=SHARE with a share above 0"));
    }
    mix.shares_.emplace_back(parts[0], share);
    mix.total_ += share;
  }
  return mix;
}

const std::string& Mix::Draw(std::mt19937_64* random) const {
  double at = std::uniform_real_distribution<double>(0.0, total_)(*random);
  for (const auto& [name, share] : shares_) {
    if ((at -= share) < 0.0) return name;
  }
  return shares_.back().first;
}

}  // namespace dejavu
