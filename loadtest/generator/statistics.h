// Statistics of measured times. Percentiles interpolate linearly between neighbours, as numpy's do by default.
#ifndef LOADTEST_GENERATOR_STATISTICS_H_
#define LOADTEST_GENERATOR_STATISTICS_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "loadtest/generator/histogram.h"
#include "nlohmann/json.hpp"

namespace dejavu {

// Of values in ascending order, at least one; `share` is of [0, 1].
double Percentile(const std::vector<float>& sorted, double share);

// {mean,median,std,p50,p90,p95,p99,p99.9,max}_NAME_ms into `json`; null without values. The standard deviation divides
// by their number.
void AddSummary(const std::string& name, const std::vector<float>& sorted, nlohmann::ordered_json* json);
// The same of what only a histogram has: percentiles within 0.5 %.
void AddSummary(const std::string& name, const TimeHistogram& histogram, nlohmann::ordered_json* json);

// 95 % bootstrap intervals, {"p50": [low, high], "p99": ..., "mean": ...}: 1,000 resamples of at most 10,000 values,
// drawn from all. They take requests as independent, which neighbours in a queue are not. Null with fewer than two
// values.
nlohmann::ordered_json BootstrapIntervals(const std::vector<float>& sorted, uint64_t seed);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_STATISTICS_H_
