#include "server/rpc/live_requests.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

class Stoppable final : public LiveRequest {
 public:
  void Stop(const absl::Status& reason) override { stopped = reason; }
  absl::Status stopped;
};

class LiveRequestsTest : public testing::Test {
 protected:
  absl::Status Add(const std::string& owner, Stoppable* request, int* freed = nullptr) {
    return live_.Add({owner, "id"}, owner, request, [freed] { ++*freed; });
  }

  LiveRequests live_;
  Stoppable ada_, bob_, again_, other_;
  const absl::Status reason_ = absl::CancelledError("over");
};

TEST_F(LiveRequestsTest, IdsOfOwnersHaveNothingToDoWithEachOther) {
  ASSERT_TRUE(Add("ada", &ada_).ok());
  ASSERT_TRUE(Add("bob", &bob_).ok());
  EXPECT_FALSE(live_.Stop({"eve", "id"}, reason_));
  EXPECT_TRUE(live_.Stop({"bob", "id"}, reason_));
  EXPECT_TRUE(ada_.stopped.ok());
  EXPECT_EQ(bob_.stopped, reason_);
}

TEST_F(LiveRequestsTest, OperatorsNameTheTenantWhereAnIdIsNotEnough) {
  ASSERT_TRUE(Add("ada", &ada_).ok());
  ASSERT_TRUE(Add("bob", &bob_).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(live_.StopOfAny("id", std::nullopt, reason_).status()));
  EXPECT_EQ(live_.StopOfAny("id", "eve", reason_).value(), false);
  EXPECT_EQ(live_.StopOfAny("id", "bob", reason_).value(), true);
  EXPECT_TRUE(ada_.stopped.ok());
  live_.Remove({"bob", "id"}, &bob_);
  EXPECT_EQ(live_.StopOfAny("id", std::nullopt, reason_).value(), true);
  EXPECT_EQ(ada_.stopped, reason_);
}

TEST_F(LiveRequestsTest, WhoFindsAnIdTakenIsWokenOnceWhenItIsFree) {
  int freed = 0, forgotten = 0;
  ASSERT_TRUE(Add("ada", &ada_).ok());
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(absl::IsAlreadyExists(Add("ada", &again_, &freed)));
  EXPECT_TRUE(absl::IsAlreadyExists(Add("ada", &other_, &forgotten)));
  live_.Remove({"ada", "id"}, &other_);  // it has not the id: it only waits no more
  EXPECT_EQ(freed, 0);
  EXPECT_TRUE(live_.Stop({"ada", "id"}, reason_));
  live_.Remove({"ada", "id"}, &ada_);
  EXPECT_EQ(freed, 1);
  EXPECT_EQ(forgotten, 0);
  EXPECT_TRUE(Add("ada", &again_, &freed).ok());
  live_.Remove({"ada", "id"}, &ada_);  // once more: the id is another one's by now
  EXPECT_TRUE(absl::IsAlreadyExists(Add("ada", &ada_, &freed)));
}

TEST_F(LiveRequestsTest, AnEndOfAllWakesThoseThatWait) {
  int freed = 0;
  ASSERT_TRUE(Add("ada", &ada_).ok());
  EXPECT_FALSE(Add("ada", &again_, &freed).ok());
  live_.StopAll(reason_);
  EXPECT_EQ(ada_.stopped, reason_);
  EXPECT_EQ(freed, 1);
}

}  // namespace
}  // namespace dejavu
