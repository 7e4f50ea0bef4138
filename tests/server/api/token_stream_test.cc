#include "server/api/token_stream.h"

#include <memory>

#include "gmock/gmock.h"
#include "google/protobuf/descriptor.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class TokenStreamTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { tokenizer_ = Tokenizer::Load(EMBEDDED_MODEL).value().release(); }
  static void TearDownTestSuite() { delete tokenizer_; }

  TokenStreamTest() {
    options_.prompt.set_request_id("r");
    options_.tokenizer = tokenizer_;
    options_.max_outbox_bytes = 1 << 20;
    options_.arrival = start_;
  }

  TokenStream& Stream() {
    if (stream_ == nullptr) stream_ = std::make_unique<TokenStream>(options_, [this] { ++wakes_; });
    return *stream_;
  }
  static Token Plain(int32_t id) {
    Token token;
    token.id = id;
    return token;
  }
  // Feeds a text's tokens until the stream wants no more; returns how many it took.
  int Feed(const std::string& text) {
    int taken = 0;
    for (int32_t id : tokenizer_->Encode(text)) {
      ++taken;
      if (!Stream().OnToken(Plain(id))) break;
    }
    return taken;
  }
  void End(FinishReason reason, int32_t stop_token_id = -1) {
    Finish finish;
    finish.reason = reason;
    finish.prompt_tokens = 4;
    finish.generated_tokens = 3;
    finish.stop_token_id = stop_token_id;
    finish.sparsity = sparsity_;
    finish.queued = start_;
    finish.scheduled = start_ + std::chrono::milliseconds(1);
    finish.first_token = start_ + std::chrono::milliseconds(10);
    finish.finished = start_ + std::chrono::milliseconds(30);
    Stream().OnFinish(finish);
  }
  // What the client would get now; an empty chunk when there is nothing.
  v1::GenerateChunk Take() {
    end_.reset();
    const auto* message = Stream().NextReply(&end_);
    got_ = message != nullptr;
    v1::GenerateChunk chunk;
    if (got_) chunk = dynamic_cast<const v1::GenerateChunk&>(*message);
    return chunk;
  }

  static const Tokenizer* tokenizer_;
  const SteadyTime start_ = std::chrono::steady_clock::now();
  TokenStreamOptions options_;
  SparsityReport sparsity_;
  std::unique_ptr<TokenStream> stream_;
  int wakes_ = 0;
  bool got_ = false;
  std::optional<absl::Status> end_;
};
const Tokenizer* TokenStreamTest::tokenizer_ = nullptr;

TEST(GenerateResponse, HasTheFieldsOfAChunk) {
  const auto* chunk = v1::GenerateChunk::descriptor();
  const auto* response = v1::GenerateResponse::descriptor();
  for (int i = 0; i < chunk->field_count(); ++i) {
    if (chunk->field(i)->name() == "sample") continue;  // 0, so not sent, in the only message that is read as both
    const auto* same = response->FindFieldByNumber(chunk->field(i)->number());
    ASSERT_NE(same, nullptr);
    EXPECT_EQ(same->name(), chunk->field(i)->name());
    EXPECT_EQ(same->type(), chunk->field(i)->type());
    EXPECT_EQ(same->label(), chunk->field(i)->label());
    EXPECT_EQ(same->message_type(), chunk->field(i)->message_type());
  }
}

TEST_F(TokenStreamTest, SendsWhatItMadeOfTheRequestAtOnce) {
  EXPECT_EQ(Take().prompt().request_id(), "r");
  EXPECT_FALSE(end_.has_value());
  Take();
  EXPECT_FALSE(got_);
}

TEST_F(TokenStreamTest, TellsOfThePromptBeforeTheOutput) {
  options_.max_outbox_bytes = 100;  // is for the output
  Take();
  const TokenLogprob top[] = {{3, -0.25f}, {9, -1.5f}};
  Token first = Plain(2);
  first.top = top;
  EXPECT_TRUE(Stream().OnPromptToken(first));
  Token second = Plain(3);
  second.has_logprob = true;
  second.logprob = -0.25f;
  second.rank = 1;
  for (int i = 0; i < 50; ++i) EXPECT_TRUE(Stream().OnPromptToken(second));
  EXPECT_TRUE(Stream().OnToken(Plain(100)));
  v1::GenerateChunk chunk = Take();
  ASSERT_EQ(chunk.prompt_logprobs_size(), 51);
  EXPECT_EQ(chunk.prompt_logprobs(0).id(), 2u);
  EXPECT_FALSE(chunk.prompt_logprobs(0).has_logprob());
  EXPECT_EQ(chunk.prompt_logprobs(0).top(1).logprob(), -1.5f);
  EXPECT_EQ(chunk.prompt_logprobs(1).logprob(), -0.25f);
  EXPECT_EQ(chunk.prompt_logprobs(1).rank(), 1u);
  EXPECT_THAT(chunk.token_ids(), ElementsAre(100));
  EXPECT_TRUE(Stream().OnToken(Plain(101)));
  EXPECT_EQ(Take().prompt_logprobs_size(), 0);
}

TEST_F(TokenStreamTest, SendsEachTokenWhenTheClientKeepsUp) {
  Take();
  const std::vector<int32_t> ids = tokenizer_->Encode("one two three");
  std::string text;
  for (int32_t id : ids) {
    ASSERT_TRUE(Stream().OnToken(Plain(id)));
    const v1::GenerateChunk chunk = Take();
    EXPECT_FALSE(chunk.has_prompt());
    EXPECT_THAT(chunk.token_ids(), ElementsAre(id));
    text += chunk.text();
  }
  EXPECT_EQ(wakes_, static_cast<int>(ids.size()));
  EXPECT_EQ(text, "one two three");
}

TEST_F(TokenStreamTest, MergesTokensWhileTheClientIsSlow) {
  Take();
  const int tokens = Feed("one two three");
  End(FinishReason::kLength);
  const v1::GenerateChunk chunk = Take();
  EXPECT_EQ(chunk.token_ids_size(), tokens);
  EXPECT_EQ(chunk.text(), "one two three");
  EXPECT_EQ(chunk.finish().reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(chunk.finish().matched_case(), v1::Finish::MATCHED_NOT_SET);
  ASSERT_TRUE(end_.has_value());
  EXPECT_TRUE(end_->ok());
}

TEST_F(TokenStreamTest, CountsTimeFromTheArrival) {
  End(FinishReason::kLength);
  const v1::Timings timings = Take().finish().timings();
  EXPECT_DOUBLE_EQ(timings.queue_ms(), 1);
  EXPECT_DOUBLE_EQ(timings.ttft_ms(), 10);
  EXPECT_DOUBLE_EQ(timings.mean_itl_ms(), 10);  // 20 ms between 3 tokens
  EXPECT_DOUBLE_EQ(timings.total_ms(), 30);
}

TEST_F(TokenStreamTest, CarriesTheSparsityReport) {
  sparsity_ = {.tier = Tier::kBalanced,
               .decode_tokens = 2,
               .mlp_density = 0.25,
               .mlp_selected = 0.375,
               .mlp_active = 0.125,
               .mlp_union_density = 0.5,
               .head_density = 0.75,
               .fallback_share = 0.0625,
               .shadow = {.tokens = 7,
                          .top1_agreement = 0.875,
                          .kl_nats = 0.03125,
                          .recall = 0.9375,
                          .precision = 0.625,
                          .missed_mass = 0.015625}};
  End(FinishReason::kLength);
  const v1::SparsityReport report = Take().finish().sparsity();
  EXPECT_EQ(report.tier(), v1::TIER_BALANCED);
  EXPECT_EQ(report.decode_tokens(), 2u);
  EXPECT_EQ(report.mlp_density(), 0.25);
  EXPECT_EQ(report.mlp_selected(), 0.375);
  EXPECT_EQ(report.mlp_active(), 0.125);
  EXPECT_EQ(report.mlp_union_density(), 0.5);
  EXPECT_EQ(report.head_density(), 0.75);
  EXPECT_EQ(report.fallback_share(), 0.0625);
  EXPECT_EQ(report.shadow().tokens(), 7u);
  EXPECT_EQ(report.shadow().top1_agreement(), 0.875);
  EXPECT_EQ(report.shadow().kl_nats(), 0.03125);
  EXPECT_EQ(report.shadow().recall(), 0.9375);
  EXPECT_EQ(report.shadow().precision(), 0.625);
  EXPECT_EQ(report.shadow().missed_mass(), 0.015625);
}

TEST_F(TokenStreamTest, LeavesTheShadowOutWhenNothingWasCompared) {
  End(FinishReason::kLength);
  const v1::SparsityReport report = Take().finish().sparsity();
  EXPECT_EQ(report.tier(), v1::TIER_EXACT);
  EXPECT_EQ(report.mlp_density(), 1.0);
  EXPECT_FALSE(report.has_shadow());
}

// However a request ends: at a stop string and at the end token it has one too.
TEST_F(TokenStreamTest, CarriesTheSparsityReportAtEveryRegularEnd) {
  sparsity_.tier = Tier::kHigh;
  for (const FinishReason reason : {FinishReason::kLength, FinishReason::kEos, FinishReason::kStopToken}) {
    stream_.reset();
    End(reason, 5);
    EXPECT_EQ(Take().finish().sparsity().tier(), v1::TIER_HIGH);
  }
  stream_.reset();
  options_.stop_strings = {"two"};
  Feed("one two");
  End(FinishReason::kSink);
  EXPECT_EQ(Take().finish().sparsity().tier(), v1::TIER_HIGH);
}

TEST_F(TokenStreamTest, AUnaryCallGetsOneReplyAtTheEnd) {
  options_.streaming = false;
  options_.max_outbox_bytes = 1;  // is for streams only
  Feed("one two");
  Take();
  EXPECT_FALSE(got_);
  EXPECT_EQ(wakes_, 0);
  End(FinishReason::kLength);
  EXPECT_EQ(wakes_, 1);
  const v1::GenerateChunk reply = Take();
  EXPECT_EQ(reply.prompt().request_id(), "r");
  EXPECT_EQ(reply.text(), "one two");
  EXPECT_TRUE(reply.has_finish());
}

TEST_F(TokenStreamTest, AUnaryCallThatFailsGetsNoReply) {
  options_.streaming = false;
  Feed("one two");
  End(FinishReason::kCancelled);
  Take();
  EXPECT_FALSE(got_);
  EXPECT_TRUE(absl::IsCancelled(*end_));
}

TEST_F(TokenStreamTest, CutsTheTextBeforeAStopStringAcrossTokens) {
  options_.stop_strings = {"zzz", "wo th"};
  Feed("one two three four");
  End(FinishReason::kSink);
  const v1::GenerateChunk chunk = Take();
  EXPECT_EQ(chunk.text(), "one t");
  EXPECT_EQ(chunk.finish().reason(), v1::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(chunk.finish().stop_string(), "wo th");
}

TEST_F(TokenStreamTest, LeavesAStopStringInTheTextIfAsked) {
  options_.stop_strings = {"wo th"};
  options_.include_stop_string = true;
  Feed("one two three four");
  End(FinishReason::kSink);
  EXPECT_EQ(Take().text(), "one two th");
}

// As vLLM has it: a stop string may begin in the first tokens and end with a later one.
TEST_F(TokenStreamTest, NoStopStringEndsWithinTheFirstTokensThatAreWanted) {
  const std::vector<int32_t> ids = tokenizer_->Encode("one two three two three");
  ASSERT_EQ(ids.size(), 5u);  // a word each
  options_.stop_strings = {"two thr"};
  struct Case {
    int32_t min_new_tokens;
    int taken;
    const char* text;
  };
  for (const Case& expected : {Case{2, 3, "one "}, Case{3, 5, "one two three "}, Case{4, 5, "one two three "},
                               Case{5, 5, "one two three two three"}}) {
    stream_.reset();
    options_.min_new_tokens = expected.min_new_tokens;
    EXPECT_EQ(Feed("one two three two three"), expected.taken) << expected.min_new_tokens;
    const bool stopped = expected.min_new_tokens < 5;
    End(stopped ? FinishReason::kSink : FinishReason::kLength);
    const v1::GenerateChunk chunk = Take();
    EXPECT_EQ(chunk.text(), expected.text) << expected.min_new_tokens;
    EXPECT_EQ(chunk.finish().reason(), stopped ? v1::FINISH_REASON_STOP_STRING : v1::FINISH_REASON_LENGTH);
  }
}

// A character that never came to its end is text of the last token, which may be one of those that are wanted.
TEST_F(TokenStreamTest, NorDoesWhatIsLeftOfACharacter) {
  const std::vector<int32_t> ids = tokenizer_->Encode("\xF0\x9F\x98\x80");
  options_.stop_strings = {"\xEF\xBF\xBD"};
  for (const int32_t min_new_tokens : {0, 1}) {
    stream_.reset();
    options_.min_new_tokens = min_new_tokens;
    ASSERT_TRUE(Stream().OnToken(Plain(ids[0])));
    End(FinishReason::kLength);
    EXPECT_EQ(Take().finish().reason(), min_new_tokens == 0 ? v1::FINISH_REASON_STOP_STRING : v1::FINISH_REASON_LENGTH);
  }
}

TEST_F(TokenStreamTest, SendsIdsAtOnceAndTextWhenItIsDecided) {
  options_.stop_strings = {" two four"};
  Take();
  const std::vector<int32_t> ids = tokenizer_->Encode(" two");
  for (int32_t id : ids) ASSERT_TRUE(Stream().OnToken(Plain(id)));
  v1::GenerateChunk chunk = Take();
  EXPECT_EQ(chunk.token_ids_size(), static_cast<int>(ids.size()));
  EXPECT_EQ(chunk.text(), "");
  End(FinishReason::kLength);
  EXPECT_EQ(Take().text(), " two");
}

TEST_F(TokenStreamTest, ReplacesACharacterThatNeverCameToItsEnd) {
  const std::vector<int32_t> ids = tokenizer_->Encode("\xF0\x9F\x98\x80");  // an emoji, in several tokens
  ASSERT_GT(ids.size(), 1u);
  ASSERT_TRUE(Stream().OnToken(Plain(ids[0])));
  EXPECT_EQ(Take().text(), "");
  End(FinishReason::kLength);
  EXPECT_EQ(Take().text(), "\xEF\xBF\xBD");
}

TEST_F(TokenStreamTest, KeepsTheEndTokenOutOfTheText) {
  Feed("one");
  Token end_token = Plain(2);
  end_token.stop = true;
  Stream().OnToken(end_token);
  End(FinishReason::kEos, end_token.id);
  v1::GenerateChunk chunk = Take();
  EXPECT_EQ(chunk.text(), "one");
  EXPECT_EQ(*chunk.token_ids().rbegin(), static_cast<uint32_t>(end_token.id));
  EXPECT_EQ(chunk.finish().reason(), v1::FINISH_REASON_EOS);
  EXPECT_EQ(chunk.finish().stop_token_id(), static_cast<uint32_t>(end_token.id));
}

TEST_F(TokenStreamTest, KeepsAStopTokenOutOfTheText) {
  const int32_t id = tokenizer_->Encode(" stop").front();
  Token stop_token = Plain(id);
  stop_token.stop = true;
  Stream().OnToken(stop_token);
  End(FinishReason::kStopToken, id);
  const v1::GenerateChunk chunk = Take();
  EXPECT_EQ(chunk.text(), "");
  EXPECT_EQ(chunk.finish().reason(), v1::FINISH_REASON_STOP_TOKEN);
}

TEST_F(TokenStreamTest, AStopStringThatIsASpecialTokenEndsAtIt) {
  for (const bool include : {false, true}) {
    options_.stop_strings = {"never", "<pad>"};
    options_.special_stops = {-1, 1};
    options_.include_stop_string = include;
    stream_.reset();
    Feed("one ne");  // what may become "never" is held back until then
    Token stop_token = Plain(1);
    stop_token.stop = true;
    Stream().OnToken(stop_token);
    End(FinishReason::kStopToken, 1);
    const v1::GenerateChunk chunk = Take();
    EXPECT_EQ(chunk.text(), include ? "one ne<pad>" : "one ne");
    EXPECT_EQ(chunk.finish().reason(), v1::FINISH_REASON_STOP_STRING);
    EXPECT_EQ(chunk.finish().stop_string(), "<pad>");
  }
}

TEST_F(TokenStreamTest, ContinuesACharacterThatThePromptBegins) {
  const std::vector<int32_t> emoji = tokenizer_->Encode("\xF0\x9F\x98\x80");
  ASSERT_GT(emoji.size(), 1u);
  options_.prompt_tail.assign(emoji.begin(), emoji.end() - 1);
  Stream().OnToken(Plain(emoji.back()));
  End(FinishReason::kLength);
  EXPECT_EQ(Take().text(), "\xF0\x9F\x98\x80");
}

TEST_F(TokenStreamTest, EndsAStreamThatItsClientDoesNotRead) {
  options_.max_outbox_bytes = 100;
  Take();
  std::string words;
  for (int i = 0; i < 100; ++i) words += " word";
  const int taken = Feed(words);
  EXPECT_LT(taken, 50);
  End(FinishReason::kSink);
  Take();
  EXPECT_FALSE(got_);
  EXPECT_TRUE(absl::IsResourceExhausted(*end_));
  EXPECT_THAT(std::string(end_->message()), HasSubstr("more than 100 bytes"));
}

TEST_F(TokenStreamTest, CarriesLogprobsAndAlternatives) {
  const TokenLogprob top[] = {{7, -0.5f}, {9, -1.5f}};
  Token token = Plain(9);
  token.has_logprob = true;
  token.logprob = -1.5f;
  token.rank = 2;
  token.top = top;
  Stream().OnToken(token);
  const v1::GenerateChunk chunk = Take();
  ASSERT_EQ(chunk.logprobs_size(), 1);
  EXPECT_EQ(chunk.logprobs(0).logprob(), -1.5f);
  EXPECT_EQ(chunk.logprobs(0).rank(), 2u);
  ASSERT_EQ(chunk.logprobs(0).top_size(), 2);
  EXPECT_EQ(chunk.logprobs(0).top(0).id(), 7u);
  EXPECT_EQ(chunk.logprobs(0).top(1).logprob(), -1.5f);
}

TEST_F(TokenStreamTest, SendsWhatWasMadeBeforeAnError) {
  Take();
  Feed("one");
  Finish finish;
  finish.reason = FinishReason::kError;
  finish.status = absl::DataLossError("the logits are not finite");
  Stream().OnFinish(finish);
  const v1::GenerateChunk chunk = Take();
  EXPECT_EQ(chunk.text(), "one");
  EXPECT_FALSE(chunk.has_finish());
  EXPECT_EQ(end_->code(), absl::StatusCode::kDataLoss);
}

TEST_F(TokenStreamTest, TranslatesTheEnginesEnds) {
  const std::pair<FinishReason, absl::StatusCode> cases[] = {
      {FinishReason::kCancelled, absl::StatusCode::kCancelled},
      {FinishReason::kDeadline, absl::StatusCode::kDeadlineExceeded},
      {FinishReason::kShutdown, absl::StatusCode::kUnavailable},
  };
  for (const auto& [reason, code] : cases) {
    stream_.reset();
    End(reason);
    Take();
    EXPECT_EQ(end_->code(), code);
  }
  stream_.reset();
  Stream().SetCancelReason(absl::UnavailableError("the server stopped"));
  End(FinishReason::kCancelled);
  Take();
  EXPECT_EQ(end_->code(), absl::StatusCode::kUnavailable);
}

TEST_F(TokenStreamTest, GivesIdsWithoutATokenizer) {
  options_.tokenizer = nullptr;
  Stream().OnToken(Plain(5));
  End(FinishReason::kLength);
  const v1::GenerateChunk chunk = Take();
  EXPECT_EQ(chunk.text(), "");
  EXPECT_THAT(chunk.token_ids(), ElementsAre(5));
}

}  // namespace
}  // namespace dejavu
