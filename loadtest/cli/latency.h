// What a client sees of a stream's timing. Tokens of one message share the time since the message before.
#ifndef LOADTEST_CLI_LATENCY_H_
#define LOADTEST_CLI_LATENCY_H_

#include <vector>

#include "kernels/base/clock.h"

namespace dejavu {

class Latency {
 public:
  explicit Latency(SteadyTime sent) : sent_(sent) {}

  void AddTokens(int count, SteadyTime arrived);

  int tokens() const { return tokens_; }
  double ttft_ms() const;             // 0 before the first token
  double mean_gap_ms() const;         // 0 with fewer than two tokens, as the next two
  double gap_ms(double share) const;  // smallest gap that at least `share` of the gaps do not exceed
  double tokens_per_second() const;   // from the request to the last token

 private:
  const SteadyTime sent_;
  SteadyTime first_, last_;
  int tokens_ = 0;
  std::vector<double> gaps_ms_;  // between neighbours: tokens_ - 1 of them
};

}  // namespace dejavu

#endif  // LOADTEST_CLI_LATENCY_H_
