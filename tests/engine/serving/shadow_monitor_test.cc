#include "engine/serving/shadow_monitor.h"

#include <random>

#include "gtest/gtest.h"
#include "tests/engine/made_predictor.h"

namespace dejavu {
namespace {

using Change = ShadowMonitor::Change;

OptConfig TwoLayers() {
  OptConfig config;
  config.layers = 2;
  config.hidden = 8;
  config.heads = 2;
  config.ffn = 10;
  return config;
}

// Layer 0 was calibrated at a missed share of 2 %, layer 1 at none; layer 1 has no point for HIGH.
class Monitor : public testing::Test {
 protected:
  Monitor() : data_(MakePredictor(TwoLayers(), Tap::kAttentionNorm, 1)), monitor_(Data(), 2) {}

  const PredictorData* Data() {
    SetMissed(0.02, &data_.layers[0].neurons);
    data_.layers[1].neurons.points[static_cast<size_t>(Tier::kHigh)].reset();
    return &data_;
  }

  // Tokens whose missed share is `share`, until something changes; how many that took, or 0 after `tokens` of them.
  int Feed(double share, int tokens, Change* change, Tier tier = Tier::kFast, int32_t layer = 0) {
    for (int i = 1; i <= tokens; ++i) {
      *change = monitor_.Observe(tier, layer, 8.0, 8.0 * share);
      if (*change != Change::kNone) return i;
    }
    return 0;
  }

  PredictorData data_;
  ShadowMonitor monitor_;
};

TEST_F(Monitor, LimitsAllowForMoreThanWasCalibratedButNotForMostOfTheMass) {
  EXPECT_GT(monitor_.limit(Tier::kFast, 0), 2 * 0.02);
  EXPECT_LT(monitor_.limit(Tier::kFast, 0), 0.3);
  EXPECT_GT(monitor_.limit(Tier::kFast, 1), 0.0) << "text differs from what was calibrated on";
  EXPECT_LT(monitor_.limit(Tier::kFast, 1), monitor_.limit(Tier::kFast, 0));
  SetMissed(1.0, &data_.layers[0].neurons);
  EXPECT_LT(ShadowMonitor(&data_, 2).limit(Tier::kFast, 0), 0.9);
  EXPECT_EQ(monitor_.limit(Tier::kHigh, 1), 1.0) << "no point, nothing to watch";
  EXPECT_EQ(ShadowMonitor(nullptr, 2).limit(Tier::kFast, 0), 1.0);
}

TEST_F(Monitor, FallsBackAfterEnoughTokensAndComesBackOnceItIsWellBelow) {
  Change change;
  const double limit = monitor_.limit(Tier::kFast, 0);
  const int needed = Feed(1.0, 1000, &change);
  EXPECT_EQ(change, Change::kFallBack);
  EXPECT_GE(needed, 8);
  EXPECT_LE(needed, 64);
  EXPECT_TRUE(monitor_.fallen_back(Tier::kFast, 0));
  EXPECT_FALSE(monitor_.fallen_back(Tier::kHigh, 0));
  EXPECT_FALSE(monitor_.fallen_back(Tier::kFast, 1));

  EXPECT_EQ(Feed(0.9 * limit, 1000, &change), 0) << "below the limit, but not well below";
  EXPECT_TRUE(monitor_.fallen_back(Tier::kFast, 0));
  EXPECT_GT(Feed(0.1 * limit, 2000, &change), needed) << "coming back takes more evidence";
  EXPECT_EQ(change, Change::kRecover);
  EXPECT_FALSE(monitor_.fallen_back(Tier::kFast, 0));
  EXPECT_GE(Feed(1.0, 1000, &change), 8) << "a second time just the same";
  EXPECT_EQ(change, Change::kFallBack);
}

TEST_F(Monitor, NeverFlapsOnConstantInput) {
  const double limit = monitor_.limit(Tier::kFast, 0);
  for (const double share : {0.0, 0.3 * limit, 0.5 * limit, 0.99 * limit, 1.01 * limit, 2 * limit, 1.0}) {
    ShadowMonitor monitor(&data_, 2);
    int changes = 0;
    for (int i = 0; i < 5000; ++i) changes += monitor.Observe(Tier::kFast, 0, 1.0, share) != Change::kNone;
    EXPECT_EQ(changes, share > limit ? 1 : 0) << share;
    EXPECT_EQ(monitor.fallen_back(Tier::kFast, 0), share > limit);
  }
}

TEST_F(Monitor, SingleTokensChangeNothing) {
  for (int i = 0; i < 5000; ++i) {
    // The first token, one in 64 after it, and never a neighbour: each misses everything, of a mass a thousand times
    // larger.
    const bool outlier = i % 64 == 0;
    const double mass = outlier ? 1000.0 : 1.0;
    for (int32_t layer = 0; layer < 2; ++layer) {
      const double missed = outlier ? mass : layer == 0 ? 0.02 : 0.0;
      EXPECT_EQ(monitor_.Observe(Tier::kFast, layer, mass, missed), Change::kNone) << i << ", layer " << layer;
    }
  }
}

// As in layer 2 of the embedded model with noise for stage B: three tokens in four look well.
TEST_F(Monitor, ABrokenLayerWhoseMassLiesInFewTokensStaysExact) {
  std::mt19937 random(4);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  int changes = 0;
  for (int i = 0; i < 20000; ++i) {
    const double missed = uniform(random) < 0.75 ? 0.01 : 0.5;
    changes += monitor_.Observe(Tier::kFast, 1, 1.0, missed) != Change::kNone;
  }
  EXPECT_EQ(changes, 1);
  EXPECT_TRUE(monitor_.fallen_back(Tier::kFast, 1));
}

TEST_F(Monitor, NoisyTokensAroundWhatWasCalibratedChangeNothing) {
  std::mt19937 random(3);
  std::exponential_distribution<double> missed(1.0 / 0.02);
  for (int i = 0; i < 20000; ++i) {
    EXPECT_EQ(monitor_.Observe(Tier::kFast, 0, 1.0, std::min(1.0, missed(random))), Change::kNone) << i;
  }
}

TEST_F(Monitor, TiersAndLayersAreWatchedApart) {
  Change change;
  for (int i = 0; i < 200; ++i) {
    monitor_.Observe(Tier::kHigh, 0, 1.0, 0.0);
    monitor_.Observe(Tier::kFast, 1, 1.0, 0.0);
  }
  EXPECT_GT(Feed(1.0, 100, &change, Tier::kBalanced, 0), 0);
  EXPECT_EQ(change, Change::kFallBack);
  EXPECT_FALSE(monitor_.fallen_back(Tier::kHigh, 0));
  EXPECT_FALSE(monitor_.fallen_back(Tier::kFast, 0));
  EXPECT_FALSE(monitor_.fallen_back(Tier::kBalanced, 1));
}

TEST_F(Monitor, TokensWithoutMassSayNothing) {
  for (int i = 0; i < 100; ++i) EXPECT_EQ(monitor_.Observe(Tier::kFast, 0, 0.0, 0.0), Change::kNone);
  Change change;
  EXPECT_GE(Feed(1.0, 100, &change), 8) << "they count as no evidence either";
}

TEST_F(Monitor, WithoutAPointNothingEverChanges) {
  Change change;
  EXPECT_EQ(Feed(1.0, 1000, &change, Tier::kHigh, 1), 0);
}

}  // namespace
}  // namespace dejavu
