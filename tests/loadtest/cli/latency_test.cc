#include "loadtest/cli/latency.h"

#include "gtest/gtest.h"

namespace dejavu {
namespace {

using std::chrono::milliseconds;

constexpr SteadyTime kSent{};

TEST(Latency, IsZeroWithoutTokens) {
  const Latency latency(kSent);
  EXPECT_EQ(latency.ttft_ms(), 0);
  EXPECT_EQ(latency.mean_gap_ms(), 0);
  EXPECT_EQ(latency.gap_ms(0.99), 0);
  EXPECT_EQ(latency.tokens_per_second(), 0);
}

TEST(Latency, OneTokenHasNoGaps) {
  Latency latency(kSent);
  latency.AddTokens(1, kSent + milliseconds(250));
  EXPECT_EQ(latency.ttft_ms(), 250);
  EXPECT_EQ(latency.mean_gap_ms(), 0);
  EXPECT_EQ(latency.tokens_per_second(), 4);
}

TEST(Latency, TokensOfOneMessageShareTheTimeSinceTheOneBefore) {
  Latency latency(kSent);
  latency.AddTokens(0, kSent + milliseconds(1));
  latency.AddTokens(2, kSent + milliseconds(10));
  latency.AddTokens(3, kSent + milliseconds(70));
  EXPECT_EQ(latency.tokens(), 5);
  EXPECT_EQ(latency.ttft_ms(), 10);
  EXPECT_EQ(latency.mean_gap_ms(), 15);  // gaps 0, 20, 20, 20
  EXPECT_EQ(latency.gap_ms(0.25), 0);
  EXPECT_EQ(latency.gap_ms(0.26), 20);
  EXPECT_DOUBLE_EQ(latency.tokens_per_second(), 5 / 0.07);
}

TEST(Latency, PercentilesAreByNearestRank) {
  Latency latency(kSent);
  SteadyTime now = kSent;
  latency.AddTokens(1, now);
  for (int gap = 100; gap >= 1; --gap) latency.AddTokens(1, now += milliseconds(gap));
  EXPECT_EQ(latency.gap_ms(0.5), 50);
  EXPECT_EQ(latency.gap_ms(0.99), 99);
  EXPECT_EQ(latency.gap_ms(1), 100);
  EXPECT_EQ(latency.gap_ms(0), 1);
}

}  // namespace
}  // namespace dejavu
