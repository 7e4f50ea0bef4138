#include "engine/sim/quantile_counter.h"

#include <algorithm>
#include <cmath>

namespace dejavu {
namespace {

constexpr double kLeastValue = 1e-6, kGrowth = 1.02;

}  // namespace

void QuantileCounter::Add(double value) {
  const double place = value <= kLeastValue ? 0.0 : std::log(value / kLeastValue) / std::log(kGrowth);
  ++buckets_[static_cast<size_t>(std::clamp(place, 0.0, static_cast<double>(buckets_.size() - 1)))];
  ++count_;
  sum_ += value;
  most_ = std::max(most_, value);
}

double QuantileCounter::Quantile(double q) const {
  if (count_ == 0) return 0.0;
  const auto rank = static_cast<int64_t>(std::ceil(q * static_cast<double>(count_)));
  int64_t seen = 0;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    seen += buckets_[i];
    if (seen >= std::max<int64_t>(1, rank))
      return std::min(most_, kLeastValue * std::pow(kGrowth, static_cast<double>(i + 1)));
  }
  return most_;
}

}  // namespace dejavu
