// Where the requests of a simulation come from: drawn from distributions, or read from a file. Wrong options and files
// are CLI11's exceptions, for main.cc, the only caller. One thread.
#ifndef ENGINE_SIM_ARRIVALS_H_
#define ENGINE_SIM_ARRIVALS_H_

#include <cstdint>
#include <fstream>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/request.h"
#include "engine/sim/simulator.h"
#include "engine/sparsity.h"

namespace dejavu {

struct SimArrivalOptions {
  double rate = 0.0, seconds = 3600.0, burstiness = 1.0;
  int64_t requests = 0;
  double prompt_tokens = 256, output_tokens = 64, spread = 0.5;
  double deadline_s = 0.0;
  uint64_t seed = 1;
  std::string tier = "dense";
  std::vector<std::string> mix, tenants;  // "NAME=SHARE"
};

// Gamma gaps (burstiness 1: Poisson) and log-normal lengths.
class DrawnArrivals {
 public:
  // Sequences of up to `context` tokens.
  DrawnArrivals(const SimArrivalOptions& options, int32_t context);

  std::optional<SimRequest> Next();

 private:
  template <typename T>
  using Shares = std::vector<std::pair<T, double>>;

  int32_t Length(double mean, int32_t most);
  template <typename T>
  T Draw(const Shares<T>& shares);

  const SimArrivalOptions options_;
  const int32_t context_;
  const Tier tier_;
  std::mt19937_64 random_;
  Shares<Urgency> mix_;
  Shares<std::string> tenants_;
  double now_s_ = 0.0;
  int64_t made_ = 0;
};

// A CSV file: the first line is kTraceHeader, the others are rows in order of arrival.
inline constexpr char kTraceHeader[] = "arrival_s,prompt_tokens,output_tokens,urgency,tenant,tier,deadline_s";
class TraceArrivals {
 public:
  explicit TraceArrivals(const std::string& path);

  std::optional<SimRequest> Next();

 private:
  const std::string path_;
  std::ifstream in_;
  int64_t line_ = 1;
  double last_s_ = 0.0;
};

}  // namespace dejavu

#endif  // ENGINE_SIM_ARRIVALS_H_
