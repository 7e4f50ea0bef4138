#include "loadtest/cli/latency.h"

#include <algorithm>
#include <cmath>

namespace dejavu {

void Latency::AddTokens(int count, SteadyTime arrived) {
  if (count == 0) return;
  if (tokens_ == 0) {
    first_ = arrived;
    gaps_ms_.assign(count - 1, 0.0);
  } else {
    gaps_ms_.insert(gaps_ms_.end(), count, Milliseconds(last_, arrived) / count);
  }
  tokens_ += count;
  last_ = arrived;
}

double Latency::ttft_ms() const { return tokens_ == 0 ? 0 : Milliseconds(sent_, first_); }

double Latency::mean_gap_ms() const { return tokens_ < 2 ? 0 : Milliseconds(first_, last_) / (tokens_ - 1); }

double Latency::gap_ms(double share) const {
  if (gaps_ms_.empty()) return 0;
  std::vector<double> sorted = gaps_ms_;
  std::sort(sorted.begin(), sorted.end());
  const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(sorted.size())));
  return sorted[std::clamp<size_t>(rank, 1, sorted.size()) - 1];
}

double Latency::tokens_per_second() const { return tokens_ == 0 ? 0 : 1000.0 * tokens_ / Milliseconds(sent_, last_); }

}  // namespace dejavu
