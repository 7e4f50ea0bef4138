#include "engine/counters.h"

#include <algorithm>
#include <numeric>

namespace dejavu {

void Histogram::Observe(double value, int64_t times) {
  const auto bucket = std::lower_bound(edges_->begin(), edges_->end(), value) - edges_->begin();
  counts_[bucket].Add(times);
  sum_.Add(value * static_cast<double>(times));
}

Histogram::Snapshot Histogram::snapshot() const {
  Snapshot snapshot;
  snapshot.counts.reserve(counts_.size());
  for (const Counter<int64_t>& count : counts_) snapshot.counts.push_back(count.value());
  snapshot.sum = sum_.value();
  return snapshot;
}

bool Histogram::observed() const {
  return std::any_of(counts_.begin(), counts_.end(), [](const Counter<int64_t>& count) { return count.value() > 0; });
}

int64_t Histogram::Snapshot::count() const { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }

}  // namespace dejavu
