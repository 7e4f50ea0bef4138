#include "server/validate.h"

#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr uint64_t kDrawnSeed = 77;

class ValidateTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { tokenizer_ = Tokenizer::Load(EMBEDDED_MODEL).value().release(); }
  static void TearDownTestSuite() { delete tokenizer_; }

  // A request that passes; the tests spoil one field each.
  static v1::GenerateRequest Good() {
    v1::GenerateRequest request;
    for (uint32_t id : {2, 5, 7}) request.mutable_token_ids()->add_ids(id);
    return request;
  }
  absl::StatusOr<CheckedGenerate> Check(const v1::GenerateRequest& request) const {
    return CheckGenerate(request, options_, model_, kDrawnSeed, /*streaming=*/true);
  }
  void ExpectRefused(const v1::GenerateRequest& request, const std::string& field, const std::string& part) const {
    const absl::Status status = Check(request).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field << ": " << status;
    EXPECT_THAT(std::string(status.message()), testing::StartsWith(field));
    EXPECT_THAT(std::string(status.message()), HasSubstr(part));
    EXPECT_TRUE(status.GetPayload("type.googleapis.com/google.rpc.BadRequest").has_value()) << field;
  }

  static const Tokenizer* tokenizer_;
  ServerOptions options_;
  ServedModel model_{"books", tokenizer_->vocab_size() + 8, 64, tokenizer_, nullptr};
};
const Tokenizer* ValidateTest::tokenizer_ = nullptr;

TEST_F(ValidateTest, FillsInTheDefaults) {
  const CheckedGenerate checked = Check(Good()).value();
  EXPECT_THAT(checked.request.prompt, ElementsAre(2, 5, 7));
  EXPECT_EQ(checked.request.max_new_tokens, 64 - 3);  // less than the server's default of 128
  EXPECT_EQ(checked.request.sampling.seed, kDrawnSeed);
  EXPECT_EQ(checked.request.sampling.temperature, 0.0f);
  EXPECT_EQ(checked.request.sampling.top_p, 1.0f);
  EXPECT_EQ(checked.request.sampling.repetition_penalty, 1.0f);
  options_.default_max_new_tokens = 10;
  EXPECT_EQ(Check(Good())->request.max_new_tokens, 10);
}

TEST_F(ValidateTest, KeepsAGivenSeed) {
  v1::GenerateRequest request = Good();
  request.mutable_sampling()->set_seed(0);
  EXPECT_EQ(Check(request)->request.sampling.seed, 0u);
  request.mutable_sampling()->set_seed(std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(Check(request)->request.sampling.seed, std::numeric_limits<uint64_t>::max());
}

TEST_F(ValidateTest, RefusesFloatsThatAreNotFiniteOrOutOfRange) {
  struct Field {
    const char* name;
    void (*set)(v1::GenerateRequest*, float);
    float low, high;
  };
  const Field fields[] = {
      {"sampling.temperature", [](auto* r, float v) { r->mutable_sampling()->set_temperature(v); }, 0, 100},
      {"sampling.top_p", [](auto* r, float v) { r->mutable_sampling()->set_top_p(v); }, 0, 1},
      {"sampling.min_p", [](auto* r, float v) { r->mutable_sampling()->set_min_p(v); }, 0, 1},
      {"penalties.repetition", [](auto* r, float v) { r->mutable_penalties()->set_repetition(v); }, 0, 100},
      {"penalties.presence", [](auto* r, float v) { r->mutable_penalties()->set_presence(v); }, -100, 100},
      {"penalties.frequency", [](auto* r, float v) { r->mutable_penalties()->set_frequency(v); }, -100, 100},
      {"penalties.logit_bias[3]", [](auto* r, float v) { (*r->mutable_penalties()->mutable_logit_bias())[3] = v; },
       -100, 100},
  };
  for (const Field& field : fields) {
    const float inf = std::numeric_limits<float>::infinity();
    for (float bad :
         {std::nanf(""), inf, -inf, 1e38f, std::nextafter(field.low, -inf), std::nextafter(field.high, inf)}) {
      v1::GenerateRequest request = Good();
      field.set(&request, bad);
      ExpectRefused(request, field.name, "it must be finite and in");
    }
    v1::GenerateRequest request = Good();
    field.set(&request, field.high);
    EXPECT_TRUE(Check(request).ok()) << field.name;
  }
}

TEST_F(ValidateTest, TreatsMinusZeroAndSubnormalsAsZero) {
  for (float tiny : {-0.0f, 1e-45f}) {
    v1::GenerateRequest request = Good();
    request.mutable_sampling()->set_temperature(tiny);
    request.mutable_sampling()->set_min_p(tiny);
    const SamplingParams params = Check(request).value().request.sampling;
    EXPECT_EQ(params.temperature, 0.0f);
    EXPECT_FALSE(std::signbit(params.temperature));
    EXPECT_EQ(params.min_p, 0.0f);
  }
  v1::GenerateRequest request = Good();
  request.mutable_sampling()->set_top_p(-0.0f);
  ExpectRefused(request, "sampling.top_p", "(0, 1]");
  request.mutable_sampling()->set_top_p(1e-45f);
  EXPECT_TRUE(std::isnormal(Check(request)->request.sampling.top_p));
}

TEST_F(ValidateTest, NamesTheValueWithAllItsDigits) {
  v1::GenerateRequest request = Good();
  request.mutable_sampling()->set_top_p(1.0000001f);
  ExpectRefused(request, "sampling.top_p", "is 1.00000012; it must be finite and in (0, 1]");
}

TEST_F(ValidateTest, RefusesCountsOutOfRange) {
  for (uint32_t bad : {0u, 62u, 1u << 31, ~0u}) {
    v1::GenerateRequest request = Good();
    request.mutable_stopping()->set_max_new_tokens(bad);
    ExpectRefused(request, "stopping.max_new_tokens", std::to_string(bad));
  }
  for (uint32_t bad : {101u, 1u << 31, ~0u}) {
    v1::GenerateRequest request = Good();
    request.mutable_output()->set_top_logprobs(bad);
    ExpectRefused(request, "output.top_logprobs", "at most 100");
  }
  v1::GenerateRequest request = Good();
  request.mutable_stopping()->set_max_new_tokens(61);  // 3 + 61 = 64
  EXPECT_EQ(Check(request)->request.max_new_tokens, 61);
  request.mutable_stopping()->set_min_new_tokens(62);
  ExpectRefused(request, "stopping.min_new_tokens", "is 62; max_new_tokens is 61");
  request.mutable_stopping()->set_min_new_tokens(61);
  request.mutable_sampling()->set_top_k(~0u);  // all there are
  EXPECT_EQ(Check(request)->request.sampling.top_k, model_.vocab);
}

TEST_F(ValidateTest, RefusesTokenIdsBeyondTheVocabulary) {
  const uint32_t vocab = static_cast<uint32_t>(model_.vocab);
  for (uint32_t bad : {vocab, 1u << 31, ~0u}) {
    const std::string limit = absl::StrCat("below ", vocab);
    v1::GenerateRequest request = Good();
    request.mutable_token_ids()->set_ids(1, bad);
    ExpectRefused(request, "token_ids.ids[1]", limit);
    request = Good();
    request.mutable_stopping()->add_stop_token_ids(bad);
    ExpectRefused(request, "stopping.stop_token_ids[0]", limit);
    request = Good();
    request.mutable_penalties()->add_allowed_token_ids(bad);
    ExpectRefused(request, "penalties.allowed_token_ids[0]", limit);
    request = Good();
    (*request.mutable_penalties()->mutable_logit_bias())[bad] = 1;
    ExpectRefused(request, "penalties.logit_bias[", limit);
  }
  v1::GenerateRequest request = Good();
  request.mutable_token_ids()->set_ids(0, vocab - 1);  // has an embedding, if no text
  EXPECT_TRUE(Check(request).ok());
}

TEST_F(ValidateTest, RefusesEmptyAndOverlongPrompts) {
  v1::GenerateRequest request;
  ExpectRefused(request, "prompt", "is missing");
  request.set_text("");
  ExpectRefused(request, "text", "is empty");
  request.mutable_token_ids();
  ExpectRefused(request, "token_ids.ids", "is empty");
  for (int i = 0; i < 64; ++i) request.mutable_token_ids()->add_ids(2);
  ExpectRefused(request, "prompt", "has 64 tokens; the model allows 64");
  request.mutable_token_ids()->add_ids(2);
  ExpectRefused(request, "token_ids", "has 65 tokens; the model allows 64");
  std::string words;
  for (int i = 0; i < 200; ++i) words += "elephant ";
  const size_t tokens = tokenizer_->EncodePrompt(words).size();
  request.set_text(words);
  ExpectRefused(request, "text", absl::StrCat("has ", tokens, " tokens; the model allows 64"));
}

TEST_F(ValidateTest, EncodesTextWithTheLeadingEndToken) {
  v1::GenerateRequest request;
  request.set_text(std::string("a\0b", 3));
  EXPECT_EQ(Check(request)->request.prompt, tokenizer_->EncodePrompt(absl::string_view("a\0b", 3)));
  EXPECT_EQ(Check(request)->request.prompt.front(), tokenizer_->bos_id());
}

TEST_F(ValidateTest, RefusesStopStringsThatAreEmptyLongOrMany) {
  v1::GenerateRequest request = Good();
  const std::string space = " ";  // g++ 12 warns wrongly of literals here (PR 105329)
  request.mutable_stopping()->add_stop_strings(space);
  EXPECT_THAT(Check(request)->stop_strings, ElementsAre(" "));
  request.mutable_stopping()->add_stop_strings("");
  ExpectRefused(request, "stopping.stop_strings[1]", "is empty");
  request.mutable_stopping()->set_stop_strings(1, std::string(257, 'x'));
  ExpectRefused(request, "stopping.stop_strings[1]", "has 257 bytes; at most 256");
  for (int i = 0; i < 10'000; ++i) request.mutable_stopping()->add_stop_strings(space);
  ExpectRefused(request, "stopping.stop_strings", "has 10002 entries; at most 8");
  request = Good();
  for (int i = 0; i < 65; ++i) request.mutable_stopping()->add_stop_token_ids(1);
  ExpectRefused(request, "stopping.stop_token_ids", "has 65 entries; at most 64");
  request = Good();
  for (uint32_t i = 0; i < 301; ++i) (*request.mutable_penalties()->mutable_logit_bias())[i] = 1;
  ExpectRefused(request, "penalties.logit_bias", "has 301 entries; at most 300");
}

TEST_F(ValidateTest, RefusesAllowedTokensThatCanNeverBeSampled) {
  v1::GenerateRequest request = Good();
  const uint32_t beyond_tokenizer = static_cast<uint32_t>(tokenizer_->vocab_size());
  request.mutable_penalties()->add_allowed_token_ids(beyond_tokenizer);
  request.mutable_penalties()->add_allowed_token_ids(beyond_tokenizer + 1);
  ExpectRefused(request, "penalties.allowed_token_ids", "leaves nothing to sample");
  request.mutable_penalties()->add_allowed_token_ids(7);
  request.mutable_penalties()->add_allowed_token_ids(7);
  EXPECT_THAT(Check(request)->request.sampling.allowed_token_ids,
              ElementsAre(7, beyond_tokenizer, beyond_tokenizer + 1));
}

TEST_F(ValidateTest, RefusesRequestIdsThatCouldForgeALog) {
  for (const std::string& bad :
       {std::string("a b"), std::string("a\nb"), std::string("\xE2\x80\xAE"), std::string("a\0", 2)}) {
    v1::GenerateRequest request = Good();
    request.set_request_id(bad);
    ExpectRefused(request, "request_id", "only A-Z a-z 0-9");
  }
  v1::GenerateRequest request = Good();
  request.set_request_id(std::string(129, 'x'));
  ExpectRefused(request, "request_id", "has 129 bytes; at most 128");
  request.set_request_id("Az09._:-");
  EXPECT_TRUE(Check(request).ok());
}

TEST_F(ValidateTest, KnowsOnlyTheServedModel) {
  v1::GenerateRequest request = Good();
  request.set_model("books");
  EXPECT_TRUE(Check(request).ok());
  request.set_model("../../etc/passwd");
  EXPECT_TRUE(absl::IsNotFound(Check(request).status()));
}

TEST_F(ValidateTest, NeedsATokenizerForTextOnly) {
  model_.tokenizer = nullptr;
  v1::GenerateRequest request = Good();
  EXPECT_TRUE(Check(request).ok());
  request.mutable_stopping()->add_stop_strings("x");
  EXPECT_TRUE(absl::IsFailedPrecondition(Check(request).status()));
  request = Good();
  request.set_text("hello");
  EXPECT_TRUE(absl::IsFailedPrecondition(Check(request).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(CheckTokenize({}, model_).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(CheckDetokenize({}, model_).status()));
}

TEST_F(ValidateTest, RefusesRepliesThatDefaultClientsCouldNotRead) {
  model_.context = 100'000;
  v1::ScoreRequest score;
  for (int i = 0; i < 3000; ++i) score.mutable_token_ids()->add_ids(2);
  score.set_top_logprobs(90);
  EXPECT_TRUE(CheckScore(score, options_, model_).ok());
  score.set_top_logprobs(100);
  const absl::Status status = CheckScore(score, options_, model_).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("3000 tokens"));

  v1::GenerateRequest generate = Good();
  generate.mutable_stopping()->set_max_new_tokens(3000);
  generate.mutable_output()->set_top_logprobs(100);
  EXPECT_TRUE(CheckGenerate(generate, options_, model_, 0, /*streaming=*/true).ok());
  EXPECT_FALSE(CheckGenerate(generate, options_, model_, 0, /*streaming=*/false).ok());
}

TEST_F(ValidateTest, ScoreAsksForNothingNew) {
  v1::ScoreRequest score;
  for (int i = 0; i < 64; ++i) score.mutable_token_ids()->add_ids(2);  // the whole context
  score.set_top_logprobs(3);
  const Request request = CheckScore(score, options_, model_).value();
  EXPECT_TRUE(request.score);
  EXPECT_EQ(request.max_new_tokens, 0);
  EXPECT_EQ(request.top_logprobs, 3);
  EXPECT_EQ(request.prompt.size(), 64u);
}

}  // namespace
}  // namespace dejavu
