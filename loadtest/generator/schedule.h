// When requests are to be sent: seeded arrival processes of an open loop. A schedule does not depend on what the server
// does; that is the point of it. One thread at a time.
#ifndef LOADTEST_GENERATOR_SCHEDULE_H_
#define LOADTEST_GENERATOR_SCHEDULE_H_

#include <cstdint>
#include <optional>
#include <random>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dejavu {

enum class ArrivalKind { kConstant, kPoisson, kGamma };

// "constant", "poisson", "gamma".
std::optional<ArrivalKind> ParseArrivalKind(absl::string_view name);

struct ArrivalOptions {
  ArrivalKind kind = ArrivalKind::kPoisson;
  int64_t count = 1;        // requests, above 0
  double rate = 1.0;        // of them per second, above 0
  double burstiness = 1.0;  // gamma's shape, as in vLLM: 1 is Poisson, less comes in bursts, more is more even
  uint64_t seed = 1;
};

// All of them within count / rate seconds: random gaps, one more of them after the last request, are scaled to fill
// that time, so that the rate that is offered is the one that was asked for, however short the run. Of exponential gaps
// this is the Poisson process given its count.
class Arrivals {
 public:
  explicit Arrivals(const ArrivalOptions& options);

  // Seconds since the start, ascending; nothing after the last. The first of a constant rate is at 0.
  std::optional<double> Next();

 private:
  double Gap();

  const ArrivalOptions options_;
  std::mt19937_64 random_;
  double scale_ = 1.0;
  int64_t made_ = 0;
  double now_s_ = 0.0;
};

// Rates from `from` to `to` in `steps` equal steps.
struct Ramp {
  double from = 0.0, to = 0.0;
  int steps = 0;

  double rate(int step) const { return steps == 1 ? from : from + (to - from) * step / (steps - 1); }
};

// "FROM:TO:STEPS".
absl::StatusOr<Ramp> ParseRamp(absl::string_view text);

}  // namespace dejavu

#endif  // LOADTEST_GENERATOR_SCHEDULE_H_
