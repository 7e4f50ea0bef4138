// TimeHistogram: counts of times in buckets 1 % wide, from a microsecond to a quarter of an hour, in memory that grows
// with the range of what was seen: a few hundred words. One thread at a time.
#ifndef LOADTEST_GENERATOR_HISTOGRAM_H_
#define LOADTEST_GENERATOR_HISTOGRAM_H_

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace dejavu {

class TimeHistogram {
 public:
  static constexpr double kGrowth = 1.01;       // upper edge over lower edge
  static constexpr double kLeastMs = 1e-3;      // the first bucket holds everything up to here
  static constexpr double kMostMs = 900'000.0;  // the last one everything above

  void Add(double ms);
  void Merge(const TimeHistogram& other);

  int64_t count() const { return count_; }
  double max_ms() const { return max_ms_; }
  // The middle of the bucket in which that share of the values is reached; nothing without values.
  std::optional<double> QuantileMs(double share) const;
  double mean_ms() const { return sum_ms_ / static_cast<double>(count_); }  // exact, as the next
  double deviation_ms() const;                                              // standard deviation
  std::vector<std::pair<double, int64_t>> Buckets() const;  // upper edge in ms and count of those that hold something

 private:
  void Reach(int bucket);

  int first_ = 0;  // bucket of counts_[0]
  std::vector<int64_t> counts_;
  int64_t count_ = 0;
  double sum_ms_ = 0.0, sum_of_squares_ = 0.0, max_ms_ = 0.0;
};

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_HISTOGRAM_H_
