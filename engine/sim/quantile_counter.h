// QuantileCounter: counts in buckets of 2 % width, for quantiles of any number of samples in little memory. One thread.
#ifndef ENGINE_SIM_QUANTILE_COUNTER_H_
#define ENGINE_SIM_QUANTILE_COUNTER_H_

#include <array>
#include <cstdint>

namespace dejavu {

class QuantileCounter {
 public:
  void Add(double value);
  int64_t count() const { return count_; }
  double mean() const { return count_ == 0 ? 0.0 : sum_ / static_cast<double>(count_); }
  double most() const { return most_; }
  // The upper edge of the bucket that holds it; 0 without samples.
  double Quantile(double q) const;

 private:
  std::array<int64_t, 1600> buckets_ = {};
  int64_t count_ = 0;
  double sum_ = 0.0, most_ = 0.0;
};

}  // namespace dejavu

#endif  // ENGINE_SIM_QUANTILE_COUNTER_H_
