#include "loadtest/generator/statistics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <functional>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"

namespace dejavu {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kResamples = 1000;
constexpr size_t kMaxResampled = 10'000;
constexpr std::pair<const char*, double> kPercentiles[] = {{"p50", 0.50}, {"p90", 0.90},    {"p95", 0.95},
                                                           {"p99", 0.99}, {"p99.9", 0.999}, {"max", 1.0}};

void AddPercentiles(const std::string& name, const std::function<double(double)>& percentile, double mean,
                    double deviation, Json* json) {
  const auto key = [&](const char* what) { return absl::StrCat(what, "_", name, "_ms"); };
  (*json)[key("mean")] = mean;
  (*json)[key("median")] = percentile(0.5);
  (*json)[key("std")] = deviation;
  for (const auto& [what, share] : kPercentiles) (*json)[key(what)] = percentile(share);
}

void AddNulls(const std::string& name, Json* json) {
  for (const char* what : {"mean", "median", "std"}) (*json)[absl::StrCat(what, "_", name, "_ms")] = nullptr;
  for (const auto& [what, share] : kPercentiles) (*json)[absl::StrCat(what, "_", name, "_ms")] = nullptr;
}

double Mean(const std::vector<float>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// The same as Percentile, of values in any order, which it changes.
double PercentileOf(std::vector<float>* values, double share) {
  const double at = share * static_cast<double>(values->size() - 1);
  const auto below = values->begin() + static_cast<ptrdiff_t>(at);
  std::nth_element(values->begin(), below, values->end());
  if (below + 1 == values->end()) return *below;
  const float above = *std::min_element(below + 1, values->end());
  return *below + (at - std::floor(at)) * (above - *below);
}

Json Interval(std::vector<double>* estimates) {
  std::sort(estimates->begin(), estimates->end());
  return {(*estimates)[kResamples / 40], (*estimates)[kResamples - kResamples / 40 - 1]};
}

}  // namespace

double Percentile(const std::vector<float>& sorted, double share) {
  const double at = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(at);
  if (below + 1 >= sorted.size()) return sorted.back();
  return sorted[below] + (at - std::floor(at)) * (static_cast<double>(sorted[below + 1]) - sorted[below]);
}

void AddSummary(const std::string& name, const std::vector<float>& sorted, Json* json) {
  if (sorted.empty()) return AddNulls(name, json);
  const double mean = Mean(sorted);
  double squares = 0.0;
  for (const float value : sorted) squares += (value - mean) * (value - mean);
  AddPercentiles(
      name, [&](double share) { return Percentile(sorted, share); }, mean,
      std::sqrt(squares / static_cast<double>(sorted.size())), json);
}

void AddSummary(const std::string& name, const TimeHistogram& histogram, Json* json) {
  if (histogram.count() == 0) return AddNulls(name, json);
  const auto percentile = [&](double share) {
    return share == 1.0 ? histogram.max_ms() : histogram.QuantileMs(share).value_or(0.0);
  };
  AddPercentiles(name, percentile, histogram.mean_ms(), histogram.deviation_ms(), json);
}

Json BootstrapIntervals(const std::vector<float>& sorted, uint64_t seed) {
  if (sorted.size() < 2) return nullptr;
  std::mt19937_64 random(seed);
  const auto draw = [&random](const std::vector<float>& from) {
    return from[static_cast<size_t>((random() >> 32) * from.size() >> 32)];
  };
  std::vector<float> values = sorted;
  if (values.size() > kMaxResampled) {
    std::shuffle(values.begin(), values.end(), random);
    values.resize(kMaxResampled);
  }
  std::array<std::vector<double>, 3> estimates;  // p50, p99, mean
  std::vector<float> resample(values.size());
  for (int i = 0; i < kResamples; ++i) {
    for (float& value : resample) value = draw(values);
    estimates[0].push_back(PercentileOf(&resample, 0.5));
    estimates[1].push_back(PercentileOf(&resample, 0.99));
    estimates[2].push_back(Mean(resample));
  }
  return {{"p50", Interval(&estimates[0])}, {"p99", Interval(&estimates[1])}, {"mean", Interval(&estimates[2])}};
}

}  // namespace dejavu
