#include "kernels/base/own_time.h"

#include "gtest/gtest.h"

namespace dejavu {
namespace {

TEST(OwnTime, IsTheTimeOfWhoCountsOften) {
  SteadyTime now;
  OwnTime waited(now);
  for (int i = 1; i <= 50; ++i) EXPECT_NEAR(waited.Count(now += Lasting(0.1)), 0.1 * i, 1e-9);
  EXPECT_NEAR(waited.Count(now), 5.0, 1e-9);
}

TEST(OwnTime, LeavesOutWhatTheProcessStoodStill) {
  SteadyTime now;
  OwnTime waited(now);
  EXPECT_NEAR(waited.Count(now += Lasting(3600.0)), 2 * OwnTime::kTickS, 1e-9);
  EXPECT_NEAR(waited.Count(now += Lasting(0.05)), 2 * OwnTime::kTickS + 0.05, 1e-9);
  EXPECT_NEAR(waited.Count(now - Lasting(1.0)), 2 * OwnTime::kTickS + 0.05, 1e-9);
}

}  // namespace
}  // namespace dejavu
