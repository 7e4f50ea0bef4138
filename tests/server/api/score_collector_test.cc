#include "server/api/score_collector.h"

#include "gtest/gtest.h"

namespace dejavu {
namespace {

TEST(ScoreCollector, RepliesOnceWithEveryToken) {
  int wakes = 0;
  v1::ScoreResponse head;
  head.set_request_id("s");
  ScoreCollector collector(head, SteadyTime(), [&] { ++wakes; });
  const TokenLogprob top[] = {{3, -0.25f}};
  Token token;
  token.id = 2;
  token.top = top;
  EXPECT_TRUE(collector.OnPromptToken(token));  // the first has no log-probability
  token.id = 3;
  token.has_logprob = true;
  token.logprob = -0.25f;
  token.rank = 1;
  EXPECT_TRUE(collector.OnPromptToken(token));
  std::optional<absl::Status> end;
  EXPECT_EQ(collector.NextReply(&end), nullptr);
  EXPECT_FALSE(end.has_value());
  Finish finish;
  finish.reason = FinishReason::kLength;
  collector.OnFinish(finish);
  EXPECT_EQ(wakes, 1);
  const auto* reply = dynamic_cast<const v1::ScoreResponse*>(collector.NextReply(&end));
  ASSERT_NE(reply, nullptr);
  EXPECT_TRUE(end->ok());
  EXPECT_EQ(reply->request_id(), "s");
  ASSERT_EQ(reply->tokens_size(), 2);
  EXPECT_FALSE(reply->tokens(0).has_logprob());
  EXPECT_EQ(reply->tokens(0).top(0).id(), 3u);
  EXPECT_EQ(reply->tokens(1).logprob(), -0.25f);
  EXPECT_EQ(reply->tokens(1).rank(), 1u);
}

}  // namespace
}  // namespace dejavu
