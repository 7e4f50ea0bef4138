// Bucket b > 0 holds (kLeastMs * kGrowth^(b-1), kLeastMs * kGrowth^b].
#include "loadtest/generator/histogram.h"

#include <algorithm>
#include <cmath>

namespace dejavu {
namespace {

const double kLogGrowth = std::log(TimeHistogram::kGrowth);

int BucketOf(double ms) {
  if (!(ms > TimeHistogram::kLeastMs)) return 0;
  return static_cast<int>(
      std::ceil(std::log(std::min(ms, TimeHistogram::kMostMs) / TimeHistogram::kLeastMs) / kLogGrowth));
}

double UpperEdge(int bucket) { return TimeHistogram::kLeastMs * std::exp(bucket * kLogGrowth); }

}  // namespace

void TimeHistogram::Reach(int bucket) {
  if (counts_.empty()) first_ = bucket;
  if (bucket < first_) {
    counts_.insert(counts_.begin(), first_ - bucket, 0);
    first_ = bucket;
  }
  if (bucket - first_ >= static_cast<int>(counts_.size())) counts_.resize(bucket - first_ + 1);
}

void TimeHistogram::Add(double ms) {
  const int bucket = BucketOf(ms);
  Reach(bucket);
  ++counts_[bucket - first_];
  ++count_;
  sum_ms_ += ms;
  sum_of_squares_ += ms * ms;
  max_ms_ = std::max(max_ms_, ms);
}

void TimeHistogram::Merge(const TimeHistogram& other) {
  if (other.count_ == 0) return;
  Reach(other.first_);
  Reach(other.first_ + static_cast<int>(other.counts_.size()) - 1);
  for (size_t i = 0; i < other.counts_.size(); ++i) counts_[other.first_ + i - first_] += other.counts_[i];
  count_ += other.count_;
  sum_ms_ += other.sum_ms_;
  sum_of_squares_ += other.sum_of_squares_;
  max_ms_ = std::max(max_ms_, other.max_ms_);
}

std::optional<double> TimeHistogram::QuantileMs(double share) const {
  if (count_ == 0) return std::nullopt;
  const auto rank = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(share * static_cast<double>(count_))));
  int64_t seen = 0;
  size_t i = 0;
  while (i + 1 < counts_.size() && (seen += counts_[i]) < rank) ++i;
  const int bucket = first_ + static_cast<int>(i);
  // Nothing is above the greatest value; the exact one is known.
  return std::min(max_ms_, bucket == 0 ? kLeastMs : UpperEdge(bucket) / std::sqrt(kGrowth));
}

double TimeHistogram::deviation_ms() const {
  const double mean = mean_ms();
  return std::sqrt(std::max(0.0, sum_of_squares_ / static_cast<double>(count_) - mean * mean));
}

std::vector<std::pair<double, int64_t>> TimeHistogram::Buckets() const {
  std::vector<std::pair<double, int64_t>> buckets;
  for (size_t i = 0; i < counts_.size(); ++i) {
    if (counts_[i] > 0) buckets.emplace_back(UpperEdge(first_ + static_cast<int>(i)), counts_[i]);
  }
  return buckets;
}

}  // namespace dejavu
