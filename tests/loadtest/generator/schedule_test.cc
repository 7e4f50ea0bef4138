#include "loadtest/generator/schedule.h"

#include <cmath>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "loadtest/generator/distribution.h"

namespace dejavu {
namespace {

using testing::HasSubstr;

std::vector<double> Times(const ArrivalOptions& options) {
  Arrivals arrivals(options);
  std::vector<double> times;
  while (const std::optional<double> time = arrivals.Next()) times.push_back(*time);
  return times;
}

struct Moments {
  double mean, variation;  // standard deviation over mean
};

Moments GapsOf(const std::vector<double>& times) {
  double last = 0.0, sum = 0.0, squares = 0.0;
  for (const double t : times) {
    sum += t - last;
    squares += (t - last) * (t - last);
    last = t;
  }
  const double n = static_cast<double>(times.size()), mean = sum / n;
  return {mean, std::sqrt(squares / n - mean * mean) / mean};
}

TEST(Arrivals, OfAConstantRateAreEvenAndDoNotDrift) {
  const std::vector<double> times = Times({ArrivalKind::kConstant, 300'001, 30.0, 1.0, 1});
  EXPECT_EQ(times[0], 0.0);
  EXPECT_DOUBLE_EQ(times[1], 1.0 / 30.0);
  EXPECT_DOUBLE_EQ(times[300'000], 10'000.0);
}

TEST(Arrivals, KeepTheRateAndTheSpreadOfTheirProcess) {
  // The coefficient of variation of a gamma of shape b is 1 / sqrt(b).
  const struct {
    ArrivalKind kind;
    double burstiness, variation;
  } cases[] = {{ArrivalKind::kPoisson, 1.0, 1.0},
               {ArrivalKind::kGamma, 1.0, 1.0},
               {ArrivalKind::kGamma, 0.25, 2.0},
               {ArrivalKind::kGamma, 4.0, 0.5}};
  for (const auto& c : cases) {
    const Moments gaps = GapsOf(Times({c.kind, 200'000, 50.0, c.burstiness, 3}));
    EXPECT_NEAR(gaps.mean, 0.02, 0.0004) << c.burstiness;
    EXPECT_NEAR(gaps.variation, c.variation, 0.03 * c.variation) << c.burstiness;
  }
}

TEST(Arrivals, AreThoseOfTheirSeed) {
  const ArrivalOptions options = {ArrivalKind::kPoisson, 100, 10.0, 1.0, 7};
  ArrivalOptions other = options;
  other.seed = 8;
  EXPECT_EQ(Times(options), Times(options));
  EXPECT_NE(Times(options), Times(other));
}

TEST(Arrivals, OfAShortRunAreSpreadOverAllOfItsTimeAndNoMore) {
  constexpr int kRuns = 4'000, kCount = 3;
  double sums[kCount] = {};
  for (uint64_t seed = 0; seed < kRuns; ++seed) {
    const std::vector<double> times = Times({ArrivalKind::kPoisson, kCount, 0.5, 1.0, seed});
    ASSERT_EQ(times.size(), kCount);
    ASSERT_TRUE(0.0 < times[0] && times[0] < times[1] && times[1] < times[2] && times[2] < kCount / 0.5);
    for (int i = 0; i < kCount; ++i) sums[i] += times[i] / kRuns;
  }
  // The k-th of n times that are uniform in [0, T]: k T / (n + 1).
  for (int i = 0; i < kCount; ++i) EXPECT_NEAR(sums[i], (i + 1) * 6.0 / (kCount + 1), 0.08) << i;
}

TEST(Ramp, StepsFromOneRateToTheOther) {
  const auto ramp = ParseRamp("5:50:10");
  ASSERT_TRUE(ramp.ok());
  EXPECT_EQ(ramp->steps, 10);
  EXPECT_DOUBLE_EQ(ramp->rate(0), 5.0);
  EXPECT_DOUBLE_EQ(ramp->rate(1), 10.0);
  EXPECT_DOUBLE_EQ(ramp->rate(9), 50.0);
  EXPECT_DOUBLE_EQ(ParseRamp("5:5:1")->rate(0), 5.0);
  for (const char* bad : {"", "5", "5:50", "0:50:2", "50:5:2", "5:50:0", "5:50:two", "5:nan:2"}) {
    EXPECT_THAT(std::string(ParseRamp(bad).status().message()), HasSubstr("FROM:TO:STEPS")) << bad;
  }
}

TEST(LengthDistribution, StaysWithinItsEnds) {
  std::mt19937_64 random(1);
  const auto fixed = LengthDistribution::Parse("32");
  const auto uniform = LengthDistribution::Parse("uniform:8:64");
  ASSERT_TRUE(fixed.ok() && uniform.ok());
  EXPECT_EQ(fixed->Draw(&random), 32);
  EXPECT_EQ(uniform->most(), 64);
  int32_t least = 1000, most = 0;
  for (int i = 0; i < 10'000; ++i) {
    const int32_t drawn = uniform->Draw(&random);
    least = std::min(least, drawn);
    most = std::max(most, drawn);
  }
  EXPECT_EQ(least, 8);
  EXPECT_EQ(most, 64);
}

TEST(LengthDistribution, OfALogNormalHasItsMedianAndNothingAboveItsMost) {
  std::mt19937_64 random(1);
  const auto lengths = LengthDistribution::Parse("lognormal:100:1:300");
  ASSERT_TRUE(lengths.ok());
  int below = 0, at_most = 0;
  for (int i = 0; i < 10'000; ++i) {
    const int32_t drawn = lengths->Draw(&random);
    ASSERT_GE(drawn, 1);
    ASSERT_LE(drawn, 300);
    below += drawn < 100;
    at_most += drawn == 300;
  }
  EXPECT_NEAR(below, 5'000, 200);
  EXPECT_NEAR(at_most, 1'360, 150);  // 1 - Phi(ln 3)
}

TEST(LengthDistribution, RefusesWhatItDoesNotKnow) {
  for (const char* bad :
       {"", "0", "-1", "uniform:8", "uniform:9:8", "lognormal:8:1", "lognormal:8:0:9", "normal:1:2"}) {
    EXPECT_FALSE(LengthDistribution::Parse(bad).ok()) << bad;
  }
}

TEST(Mix, IsDrawnByItsShares) {
  std::mt19937_64 random(1);
  const auto mix = Mix::Parse("dense=1,balanced=3");
  ASSERT_TRUE(mix.ok());
  int dense = 0;
  for (int i = 0; i < 10'000; ++i) dense += mix->Draw(&random) == "dense";
  EXPECT_NEAR(dense, 2'500, 150);
  EXPECT_EQ(Mix::Parse("fast")->Draw(&random), "fast");
  for (const char* bad : {"", "a,b", "a=0", "a=-1", "=1", "a=1=2", "a=x"}) EXPECT_FALSE(Mix::Parse(bad).ok()) << bad;
}

}  // namespace
}  // namespace dejavu
