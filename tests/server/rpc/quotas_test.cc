// Quotas on a clock of the test's own.
#include "server/rpc/quotas.h"

#include <chrono>
#include <string>

#include "dejavu/rpc/status.pb.h"
#include "engine/refusal.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

class QuotasTest : public testing::Test {
 protected:
  absl::Status Take(int64_t tokens = 0) { return quotas_.Take("ada", limits_, tokens, now_); }
  // Until it would be let in, as it is told.
  static milliseconds WaitOf(const absl::Status& refused) {
    EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
    const auto info = RefusalOf(refused);
    return info.has_value() ? info->retry_after : milliseconds(-1);
  }
  template <typename Detail>
  static Detail DetailOf(const absl::Status& status, const std::string& type) {
    Detail detail;
    const auto payload = status.GetPayload("type.googleapis.com/google.rpc." + type);
    EXPECT_TRUE(payload.has_value()) << type;
    detail.ParseFromString(std::string(payload.value_or(absl::Cord())));
    return detail;
  }

  Quotas quotas_;
  TenantLimits limits_;
  SteadyTime now_ = SteadyTime(std::chrono::hours(1));
};

TEST_F(QuotasTest, AMinutesWorthMayComeAtOnceAndMoreAtTheRateOfTheQuota) {
  limits_.requests_per_minute = 60;
  for (int i = 0; i < 60; ++i) ASSERT_TRUE(Take().ok());
  EXPECT_EQ(WaitOf(Take()), milliseconds(1000));
  now_ += milliseconds(999);
  EXPECT_EQ(WaitOf(Take()), milliseconds(1));
  now_ += milliseconds(1);
  EXPECT_TRUE(Take().ok());
  EXPECT_EQ(WaitOf(Take()), milliseconds(1000));
  now_ += std::chrono::hours(9);  // no more than a minute's worth is saved up
  for (int i = 0; i < 60; ++i) ASSERT_TRUE(Take().ok());
  EXPECT_FALSE(Take().ok());
}

TEST_F(QuotasTest, WhoeverWaitsAsAdvisedGetsIn) {
  limits_.requests_per_minute = 7;
  limits_.tokens_per_minute = 1000;
  for (int i = 0; i < 500; ++i) {
    const int64_t tokens = 1 + i * 37 % 900;
    const absl::Status taken = Take(tokens);
    if (taken.ok()) continue;
    const milliseconds wait = WaitOf(taken);
    ASSERT_GT(wait.count(), 0);
    now_ += wait - milliseconds(1);
    const milliseconds rest = WaitOf(Take(tokens));
    ASSERT_LE(rest, wait);
    now_ += rest;
    // The other quota may be short still, but not the one that was waited for.
    while (true) {
      const absl::Status again = Take(tokens);
      if (again.ok()) break;
      now_ += WaitOf(again);
    }
  }
}

TEST_F(QuotasTest, TokensThatWereNotUsedComeBack) {
  limits_.tokens_per_minute = 100;
  ASSERT_TRUE(Take(100).ok());
  EXPECT_EQ(WaitOf(Take(50)), milliseconds(30'000));
  quotas_.GiveBack("ada", 0.0, 60.0, now_);
  EXPECT_TRUE(Take(60).ok());
  EXPECT_FALSE(Take(1).ok());
  quotas_.GiveBack("ada", 0.0, 1000.0, now_);  // never below nothing
  EXPECT_TRUE(Take(100).ok());
  EXPECT_FALSE(Take(1).ok());
}

TEST_F(QuotasTest, ARequestBeyondTheQuotaIsToldThatWaitingIsOfNoUse) {
  limits_.tokens_per_minute = 100;
  const absl::Status refused = Take(101);
  EXPECT_EQ(WaitOf(refused), milliseconds(0));
  EXPECT_THAT(refused.message(), HasSubstr("may take 101; the tenant's quota is 100"));
  EXPECT_TRUE(Take(100).ok());
}

TEST_F(QuotasTest, ConcurrentRequestsAreCounted) {
  limits_.concurrent_requests = 2;
  ASSERT_TRUE(Take().ok());
  ASSERT_TRUE(Take().ok());
  EXPECT_GT(WaitOf(Take()).count(), 0);
  EXPECT_TRUE(quotas_.Take("bob", limits_, 0, now_).ok());  // another tenant
  quotas_.End("ada");
  EXPECT_TRUE(Take().ok());
  EXPECT_FALSE(Take().ok());
}

TEST_F(QuotasTest, ARefusalBooksNothing) {
  limits_ = {.requests_per_minute = 2, .tokens_per_minute = 10, .concurrent_requests = 5};
  ASSERT_TRUE(Take(10).ok());
  for (int i = 0; i < 9; ++i) EXPECT_FALSE(Take(1).ok());
  quotas_.GiveBack("ada", 0.0, 10.0, now_);
  EXPECT_TRUE(Take(1).ok());
  EXPECT_EQ(quotas_.UsageOf("ada", limits_, now_).running, 2);
}

TEST_F(QuotasTest, LimitsChangeAndWhatWasUsedStays) {
  limits_.requests_per_minute = 60;
  for (int i = 0; i < 40; ++i) ASSERT_TRUE(Take().ok());
  limits_.requests_per_minute = 30;
  EXPECT_EQ(WaitOf(Take()), milliseconds(22'000));  // 11 too many, at one in two seconds
  limits_.requests_per_minute = 100;
  for (int i = 0; i < 60; ++i) ASSERT_TRUE(Take().ok());
  EXPECT_FALSE(Take().ok());
  limits_.requests_per_minute.reset();
  for (int i = 0; i < 1000; ++i) ASSERT_TRUE(Take().ok());
  limits_.requests_per_minute = 5;  // what was free counts for nothing
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(Take().ok());
  EXPECT_FALSE(Take().ok());
}

TEST_F(QuotasTest, ARefusalNamesQuotaValueAndLimit) {
  limits_.concurrent_requests = 1;
  ASSERT_TRUE(Take().ok());
  const absl::Status refused = Take();
  EXPECT_EQ(DetailOf<rpc::QuotaFailure>(refused, "QuotaFailure").violations(0).subject(), "concurrent_requests");
  const auto info = DetailOf<rpc::ErrorInfo>(refused, "ErrorInfo");
  EXPECT_EQ(info.reason(), "QUOTA_EXCEEDED");
  EXPECT_EQ(info.metadata().at("quota"), "concurrent_requests");
  EXPECT_EQ(info.metadata().at("value"), "2");
  EXPECT_EQ(info.metadata().at("limit"), "1");
}

TEST_F(QuotasTest, ALeaseActsOnce) {
  const auto quotas = std::make_shared<Quotas>();
  const TenantLimits limits = {.requests_per_minute = 1'000'000, .tokens_per_minute = 1'000'000'000};
  const auto usage = [&] { return quotas->UsageOf("ada", limits, std::chrono::steady_clock::now()); };
  const auto take = [&] {
    EXPECT_TRUE(quotas->Take("ada", limits, 500'000'000, std::chrono::steady_clock::now()).ok());
    return std::make_unique<QuotaLease>(quotas, "ada", 500'000'000);
  };
  auto lease = take();
  lease->End();
  lease->End();
  lease->Settle(400'000'000);
  lease->Settle(0);
  lease.reset();
  EXPECT_EQ(usage().running, 0);
  EXPECT_GT(usage().tokens, 0.0);
  EXPECT_LE(usage().tokens, 400'000'000.0);
  // What the engine never took counts for nothing, neither as tokens nor as a request.
  const double before = usage().tokens;
  take().reset();
  EXPECT_LE(usage().tokens, before);
  EXPECT_LE(usage().requests, 1.0);
  EXPECT_EQ(usage().running, 0);
}

}  // namespace
}  // namespace dejavu
