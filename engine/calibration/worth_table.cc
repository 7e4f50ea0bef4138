#include "engine/calibration/worth_table.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace dejavu {
namespace {

constexpr double kLow = -6.0, kHigh = 8.0, kStep = 0.01;

double NormalShare(double u) { return 0.5 * std::erfc(-u / std::sqrt(2.0)); }  // P(standard normal < u)

}  // namespace

WorthTable::WorthTable() {
  for (double u = kLow; u <= kHigh; u += kStep) {
    const double phi = std::exp(-u * u / 2.0) / std::sqrt(2.0 * M_PI), cdf = NormalShare(u);
    log_ratio_.push_back(std::log((1.0 + cdf) / std::max((1.0 + u * u) * cdf + u * phi, 1e-300)));
  }
}

double WorthTable::Threshold(double k) const {
  const double log_k = std::log(std::max(k, 1e-300));
  if (log_k < log_ratio_.back()) return std::numeric_limits<double>::infinity();
  const auto it = std::lower_bound(log_ratio_.begin(), log_ratio_.end(), log_k, std::greater<double>());
  return kLow + kStep * static_cast<double>(it - log_ratio_.begin());
}

}  // namespace dejavu
