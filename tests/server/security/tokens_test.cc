// Lines of a token file: who may call, and how much.
#include "server/security/tokens.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

const std::string kHash(64, 'a'), kOther(64, 'b');  // of nothing that anybody knows

class TokensTest : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<Tokens>> Load(const std::string& text) {
    return Tokens::Load(folder_.Write("tokens", text));
  }
  std::string Refusal(const std::string& settings) {
    const absl::Status status = Load(absl::StrCat("# comment\nada:", kHash, " ", settings, "\n")).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << settings;
    return std::string(status.message());
  }

  ScratchDirectory folder_;
};

TEST_F(TokensTest, ALineMaySayHowMuch) {
  const auto tokens = Load(absl::StrCat("ada:", kHash,
                                        " requests_per_minute=60\ttokens_per_minute=10000  concurrent_requests=4 "
                                        "highest_tier=exact lowest_tier=fast \r\nbob:",
                                        kOther, "\n"))
                          .value();
  const TenantLimits ada = tokens->LimitsOf("ada");
  EXPECT_EQ(ada, (TenantLimits{60, 10000, 4, Tier::kExact, Tier::kFast}));
  EXPECT_EQ(tokens->LimitsOf("bob"), TenantLimits());
  EXPECT_EQ(tokens->LimitsOf("nobody"), TenantLimits());
}

TEST_F(TokensTest, LinesOfATenantAgree) {
  const auto lines = [&](const std::string& first, const std::string& second) {
    return Load(absl::StrCat("ada:", kHash, first, "\nada:", kOther, second, "\n"));
  };
  EXPECT_EQ(lines(" requests_per_minute=60", "").value()->LimitsOf("ada").requests_per_minute, 60);
  EXPECT_EQ(lines("", " requests_per_minute=60").value()->LimitsOf("ada").requests_per_minute, 60);
  EXPECT_EQ(lines(" requests_per_minute=60", " requests_per_minute=60").value()->size(), 2u);
  const absl::Status refused = lines(" requests_per_minute=60", " requests_per_minute=61").status();
  EXPECT_THAT(std::string(refused.message()), AllOf(HasSubstr("line 2"), HasSubstr("another value")));
}

TEST_F(TokensTest, WhatIsNoSettingIsRefusedWithItsLineAndNotItsText) {
  for (const char* settings :
       {"sesame=1", "sesame", "=", "requests_per_minute", "requests_per_minute=", "requests_per_minute=0",
        "requests_per_minute=-1", "requests_per_minute=+1", "requests_per_minute=1.5", "requests_per_minute=1e3",
        "requests_per_minute=99999999999999999999", "tokens_per_minute=sesame", "concurrent_requests= 4",
        "highest_tier=sesame", "highest_tier=Exact", "lowest_tier=", "highest_tier=fast lowest_tier=exact",
        "requests_per_minute=1 requests_per_minute=2", "REQUESTS_PER_MINUTE=1"}) {
    EXPECT_THAT(Refusal(settings), AllOf(HasSubstr("line 2"), Not(HasSubstr("sesame")))) << settings;
  }
}

TEST_F(TokensTest, AReloadKeepsTheOldLimitsWhereTheNewOnesAreWrong) {
  const auto tokens = Load(absl::StrCat("ada:", kHash, " concurrent_requests=4\n")).value();
  folder_.Write("tokens", absl::StrCat("ada:", kHash, " concurrent_requests=none\n"));
  EXPECT_FALSE(tokens->Reload().ok());
  EXPECT_EQ(tokens->LimitsOf("ada").concurrent_requests, 4);
  folder_.Write("tokens", absl::StrCat("ada:", kHash, " concurrent_requests=9\n"));
  EXPECT_EQ(tokens->Reload().value(), true);
  EXPECT_EQ(tokens->LimitsOf("ada").concurrent_requests, 9);
}

}  // namespace
}  // namespace dejavu
