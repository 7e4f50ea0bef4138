#include "kernels/base/clock.h"

#include <chrono>
#include <limits>

#include "gtest/gtest.h"

namespace dejavu {
namespace {

TEST(Lasting, IsSoManySeconds) {
  EXPECT_EQ(Lasting(1.5), std::chrono::milliseconds(1500));
  EXPECT_EQ(Lasting(-2), std::chrono::seconds(-2));
}

TEST(Lasting, NeverMovesAPointOfTimeBeyondWhatItCanHold) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const double seconds : {1e10, 9.3e9 * 3600, 1e300, kInfinity}) {
    EXPECT_GT(std::chrono::steady_clock::now() + Lasting(seconds), std::chrono::steady_clock::now());
    EXPECT_GT(std::chrono::system_clock::now() + Lasting(seconds), std::chrono::system_clock::now());
    EXPECT_LT(std::chrono::steady_clock::now() + Lasting(-seconds), std::chrono::steady_clock::now());
  }
  EXPECT_EQ(Lasting(std::numeric_limits<double>::quiet_NaN()), SteadyTime::duration::zero());
}

}  // namespace
}  // namespace dejavu
