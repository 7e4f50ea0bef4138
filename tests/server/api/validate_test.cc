#include "server/api/validate.h"

#include <cmath>
#include <fstream>
#include <limits>
#include <memory>

#include "absl/strings/str_cat.h"
#include "dejavu/rpc/status.pb.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/scratch_directory.h"
#include "tests/server/fake_engine.h"

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
  FakeEngine engine_;
  ServedModel model_{"books", tokenizer_->vocab_size() + 8, 64, tokenizer_, &engine_};
};
const Tokenizer* ValidateTest::tokenizer_ = nullptr;

TEST_F(ValidateTest, FillsInTheDefaults) {
  const CheckedGenerate checked = Check(Good()).value();
  EXPECT_THAT(checked.request.prompt, ElementsAre(2, 5, 7));
  EXPECT_EQ(checked.request.max_new_tokens, 64 - 3 + 1);  // less than the server's default of 128
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
  for (uint32_t bad : {0u, 63u, 1u << 31, ~0u}) {
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
  request.mutable_stopping()->set_max_new_tokens(63);
  ExpectRefused(request, "stopping.max_new_tokens",
                "is 63 after a prompt of 3 tokens; the model's context of 64 leaves 62");
  request.mutable_stopping()->set_max_new_tokens(62);  // 3 + 62 = 65, of which the last is never read
  EXPECT_EQ(Check(request)->request.max_new_tokens, 62);
  request.mutable_stopping()->set_min_new_tokens(63);
  ExpectRefused(request, "stopping.min_new_tokens", "is 63; max_new_tokens is 62");
  request.mutable_stopping()->set_min_new_tokens(62);
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
  EXPECT_THAT(Check(request)->request.prompt, ElementsAre(2));  // </s> alone, as the tokenizer makes it
  request.mutable_token_ids();
  ExpectRefused(request, "token_ids.ids", "is empty");
  for (int i = 0; i < 64; ++i) request.mutable_token_ids()->add_ids(2);
  EXPECT_EQ(Check(request)->request.max_new_tokens, 1);  // the context is full, and says what comes next
  request.mutable_token_ids()->add_ids(2);
  ExpectRefused(request, "token_ids", "has 65 tokens; the model allows 64");
  std::string words;
  for (int i = 0; i < 80; ++i) words += "elephant ";
  const size_t tokens = tokenizer_->EncodePrompt(words).size();
  request.set_text(words);
  ExpectRefused(request, "text", absl::StrCat("has ", tokens, " tokens; the model allows 64"));
}

TEST_F(ValidateTest, RefusesATextThatNoTokenisationCouldMakeShortEnough) {
  const size_t most = 64 * tokenizer_->longest_token_bytes();
  v1::GenerateRequest request;
  request.set_text(std::string(most + 1, 'x'));
  ExpectRefused(request, "text", absl::StrCat("has ", most + 1, " bytes; no text of more than ", most, " bytes fits"));
}

TEST_F(ValidateTest, KnowsTheLongestToken) {
  size_t longest = 0;
  for (int32_t id = 0; id < tokenizer_->vocab_size(); ++id) longest = std::max(longest, tokenizer_->Bytes(id).size());
  EXPECT_EQ(tokenizer_->longest_token_bytes(), longest);
}

TEST_F(ValidateTest, EncodesTextWithTheLeadingEndToken) {
  v1::GenerateRequest request;
  request.set_text(std::string("a\0b", 3));
  EXPECT_EQ(Check(request)->request.prompt, tokenizer_->EncodePrompt(absl::string_view("a\0b", 3)));
  EXPECT_EQ(Check(request)->request.prompt.front(), 2);
}

TEST_F(ValidateTest, ParsesSpecialTokensOnlyWhereTheRequestAsksForIt) {
  v1::GenerateRequest request;
  request.set_text("a</s>");
  EXPECT_GT(Check(request)->request.prompt.size(), 4u);
  request.set_parse_special_tokens(true);
  EXPECT_EQ(Check(request)->request.prompt, tokenizer_->EncodePrompt("a</s>", true));
  EXPECT_EQ(Check(request)->request.prompt.back(), 2);
  v1::TokenizeRequest tokenize;
  tokenize.set_text("a</s>");
  EXPECT_EQ(CheckTokenize(tokenize, model_)->size(), tokenizer_->EncodePrompt("a</s>").size());
  tokenize.set_parse_special_tokens(true);
  EXPECT_EQ(CheckTokenize(tokenize, model_)->back(), 2);
  v1::ScoreRequest score;
  score.set_text("a</s>");
  score.set_parse_special_tokens(true);
  EXPECT_EQ(CheckScore(score, options_, model_)->front().prompt.back(), 2);
}

TEST_F(ValidateTest, AStopStringThatIsASpecialTokenIsAStopToken) {
  v1::GenerateRequest request = Good();
  for (const std::string stop : {"</s", "<pad>", "</s>"}) request.mutable_stopping()->add_stop_strings(stop);
  EXPECT_THAT(Check(request)->special_stops, ElementsAre(-1, 1, 2));
  EXPECT_THAT(Check(request)->request.stop_token_ids, ElementsAre(1, 2));
}

// A tokenizer without </s> before a prompt, with a hole in its ids and with more tokens than the model.
TEST_F(ValidateTest, HoldsTextsAgainstTheModelsOwnIds) {
  const ScratchDirectory directory;
  nlohmann::json root = nlohmann::json::parse(std::ifstream(EMBEDDED_MODEL "/tokenizer.json"));
  root["post_processor"] = nullptr;
  const int32_t size = static_cast<int32_t>(root["model"]["vocab"].size());
  root["model"]["vocab"]["far"] = size + 10;
  directory.Write("tokenizer.json", root.dump());
  directory.Write("tokenizer_config.json",
                  R"({"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "far"})");
  const std::unique_ptr<Tokenizer> tokenizer = Tokenizer::Load(directory.path()).value();
  model_.tokenizer = tokenizer.get();
  model_.vocab = size + 2;

  EXPECT_THAT(Check(Good())->request.sampling.unused_ids, ElementsAre(size, size + 1));
  v1::GenerateRequest request = Good();
  request.mutable_penalties()->add_allowed_token_ids(static_cast<uint32_t>(size + 1));
  ExpectRefused(request, "penalties.allowed_token_ids", "leaves nothing to sample");
  request = Good();
  request.set_text("");
  ExpectRefused(request, "text", "puts nothing before a prompt");
  request.set_text("a far");
  EXPECT_TRUE(Check(request).ok());
  request.set_parse_special_tokens(true);
  ExpectRefused(request, "text", absl::StrCat("which has id ", size + 10, "; ids of this model are below ", size + 2));
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

TEST_F(ValidateTest, TakesTheServersTierAndShadowWhereTheRequestNamesNone) {
  SparsityParams params = Check(Good()).value().request.sparsity;
  EXPECT_EQ(params.tier, Tier::kExact);
  EXPECT_FALSE(params.deterministic);
  EXPECT_EQ(params.shadow_every, 256);
  engine_.predictor_info.tiers = {Tier::kBalanced};
  options_.default_tier = Tier::kBalanced;
  options_.shadow_every = 0;
  v1::GenerateRequest request = Good();
  request.mutable_sparsity()->set_deterministic(true);
  params = Check(request).value().request.sparsity;
  EXPECT_EQ(params.tier, Tier::kBalanced);
  EXPECT_TRUE(params.deterministic);
  EXPECT_EQ(params.shadow_every, 0);
}

TEST_F(ValidateTest, TakesTheTierThatTheRequestNames) {
  engine_.predictor_info.tiers = {Tier::kHigh, Tier::kBalanced, Tier::kFast};
  const std::pair<v1::Tier, Tier> tiers[] = {{v1::TIER_DENSE, Tier::kDense},
                                             {v1::TIER_EXACT, Tier::kExact},
                                             {v1::TIER_HIGH, Tier::kHigh},
                                             {v1::TIER_BALANCED, Tier::kBalanced},
                                             {v1::TIER_FAST, Tier::kFast}};
  for (const auto& [message, tier] : tiers) {
    v1::GenerateRequest request = Good();
    request.mutable_sparsity()->set_tier(message);
    EXPECT_EQ(Check(request)->request.sparsity.tier, tier) << Name(tier);
  }
}

TEST_F(ValidateTest, RefusesTiersThatTheApiDoesNotKnow) {
  for (int bad : {-1, 6, std::numeric_limits<int>::max()}) {
    v1::GenerateRequest request = Good();
    request.mutable_sparsity()->set_tier(static_cast<v1::Tier>(bad));
    ExpectRefused(request, "sparsity.tier", absl::StrCat("is ", bad, "; it must be 0 to 5"));
  }
}

TEST_F(ValidateTest, RefusesTiersThatTheServerDoesNotAllow) {
  engine_.predictor_info.tiers = {Tier::kHigh, Tier::kBalanced, Tier::kFast};
  options_.highest_tier = Tier::kExact;
  options_.lowest_tier = Tier::kHigh;
  v1::GenerateRequest request = Good();
  request.mutable_sparsity()->set_tier(v1::TIER_DENSE);
  ExpectRefused(request, "sparsity.tier", "is dense; this server allows exact to high");
  request.mutable_sparsity()->set_tier(v1::TIER_BALANCED);
  ExpectRefused(request, "sparsity.tier", "is balanced; this server allows exact to high");
  for (v1::Tier good : {v1::TIER_EXACT, v1::TIER_HIGH}) {
    request.mutable_sparsity()->set_tier(good);
    EXPECT_TRUE(Check(request).ok()) << v1::Tier_Name(good);
  }
}

TEST_F(ValidateTest, SaysThatATierNeedsAPredictorInsteadOfTakingAnother) {
  engine_.predictor_info.tiers = {Tier::kHigh};
  v1::GenerateRequest request = Good();
  request.mutable_sparsity()->set_tier(v1::TIER_FAST);
  const absl::Status status = Check(request).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("tier fast"));
  const auto detail = status.GetPayload("type.googleapis.com/google.rpc.PreconditionFailure");
  ASSERT_TRUE(detail.has_value());
  rpc::PreconditionFailure failure;
  ASSERT_TRUE(failure.ParseFromString(std::string(*detail)));
  EXPECT_EQ(failure.violations(0).type(), "FEATURE");
  EXPECT_EQ(failure.violations(0).subject(), "predictor");
  // What the server forbids is the request's mistake, whatever is loaded.
  options_.lowest_tier = Tier::kHigh;
  ExpectRefused(request, "sparsity.tier", "is fast; this server allows dense to high");
  // The default is not exempt.
  options_.lowest_tier = options_.default_tier = Tier::kFast;
  EXPECT_TRUE(absl::IsFailedPrecondition(Check(Good()).status()));
}

TEST_F(ValidateTest, HoldsShadowChecksAgainstTheServersLimit) {
  options_.min_shadow_every = 10;
  for (uint32_t bad : {1u, 9u, 1'000'000'001u, 1u << 31, ~0u}) {
    v1::GenerateRequest request = Good();
    request.mutable_sparsity()->set_shadow_every(bad);
    ExpectRefused(request, "sparsity.shadow_every", absl::StrCat("is ", bad, "; it must be 0, or 10 to 1000000000"));
  }
  for (uint32_t good : {0u, 10u, 1'000'000'000u}) {  // in tier exact too, where they do nothing
    v1::GenerateRequest request = Good();
    request.mutable_sparsity()->set_shadow_every(good);
    EXPECT_EQ(Check(request)->request.sparsity.shadow_every, static_cast<int32_t>(good));
  }
  options_.min_shadow_every = 1;
  v1::GenerateRequest request = Good();
  request.mutable_sparsity()->set_shadow_every(1);
  EXPECT_EQ(Check(request)->request.sparsity.shadow_every, 1);
}

TEST_F(ValidateTest, TakesTheServersSpeculationWhereTheRequestNamesNone) {
  SpeculationParams params = Check(Good()).value().request.speculation;
  EXPECT_EQ(params.mode, SpeculationMode::kAuto);
  EXPECT_FALSE(params.tier_drafts()) << "no predictor is loaded";
  EXPECT_TRUE(params.lookup);
  EXPECT_EQ(params.most_tokens, 6);
  engine_.predictor_info.tiers = {Tier::kHigh, Tier::kBalanced, Tier::kFast};
  options_.speculation_mode = "off";
  options_.speculation_draft_tier = "fast";
  options_.speculation_lookup = false;
  options_.speculation_most_tokens = 3;
  params = Check(Good()).value().request.speculation;
  EXPECT_EQ(params.mode, SpeculationMode::kOff);
  EXPECT_EQ(params.draft_tier, Tier::kFast);
  EXPECT_FALSE(params.lookup);
  EXPECT_EQ(params.most_tokens, 3);
  options_.speculation_draft_tier = "none";
  EXPECT_FALSE(Check(Good()).value().request.speculation.tier_drafts());
}

TEST_F(ValidateTest, TakesTheSpeculationThatTheRequestNames) {
  engine_.predictor_info.tiers = {Tier::kHigh, Tier::kBalanced};
  options_.speculation_allow_always = true;
  v1::GenerateRequest request = Good();
  v1::Speculation& asked = *request.mutable_speculation();
  asked.set_mode(v1::SPECULATION_MODE_ALWAYS);
  asked.set_draft_tier(v1::TIER_BALANCED);
  asked.set_lookup(false);
  asked.set_most_tokens(16);
  const SpeculationParams params = Check(request).value().request.speculation;
  EXPECT_EQ(params.mode, SpeculationMode::kAlways);
  EXPECT_EQ(params.draft_tier, Tier::kBalanced);
  EXPECT_FALSE(params.lookup);
  EXPECT_EQ(params.most_tokens, 16);
  asked.set_draft_tier(v1::TIER_FAST);
  EXPECT_TRUE(absl::IsFailedPrecondition(Check(request).status())) << "the predictor has no such tier";
}

TEST_F(ValidateTest, RefusesSpeculationThatThereIsNot) {
  engine_.predictor_info.tiers = {Tier::kHigh, Tier::kBalanced, Tier::kFast};
  const auto expect_refused = [&](auto change, const char* field, const std::string& what) {
    v1::GenerateRequest request = Good();
    change(*request.mutable_speculation());
    ExpectRefused(request, field, what);
  };
  for (const int bad : {-1, 4, std::numeric_limits<int>::max()}) {
    expect_refused([&](auto& s) { s.set_mode(static_cast<v1::SpeculationMode>(bad)); }, "speculation.mode",
                   absl::StrCat("is ", bad, "; it must be 0 to 3"));
  }
  expect_refused([](auto& s) { s.set_mode(v1::SPECULATION_MODE_ALWAYS); }, "speculation.mode",
                 "is ALWAYS; this server allows OFF and AUTO");
  for (const int bad : {-1, 1, 2, 6}) {
    expect_refused([&](auto& s) { s.set_draft_tier(static_cast<v1::Tier>(bad)); }, "speculation.draft_tier",
                   absl::StrCat("is ", bad, "; it must be HIGH (3), BALANCED (4) or FAST (5)"));
  }
  for (const uint32_t bad : {0u, 17u, ~0u}) {
    expect_refused([&](auto& s) { s.set_most_tokens(bad); }, "speculation.most_tokens",
                   absl::StrCat("is ", bad, "; it must be in 1 ... 16"));
  }
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

  // A prompt is told at once, in streams too, and beside the output.
  *generate.mutable_token_ids() = score.token_ids();
  generate.mutable_stopping()->set_max_new_tokens(1000);
  generate.mutable_output()->set_prompt_top_logprobs(100);
  for (const bool streaming : {true, false}) {
    EXPECT_FALSE(CheckGenerate(generate, options_, model_, 0, streaming).ok());
  }
  generate.mutable_output()->set_prompt_top_logprobs(80);
  EXPECT_TRUE(CheckGenerate(generate, options_, model_, 0, /*streaming=*/true).ok());
  const absl::Status both = CheckGenerate(generate, options_, model_, 0, /*streaming=*/false).status();
  EXPECT_THAT(std::string(both.message()), HasSubstr("output.prompt_top_logprobs is 80"));
}

TEST_F(ValidateTest, ScoreAsksForNothingNew) {
  v1::ScoreRequest score;
  for (int i = 0; i < 64; ++i) score.mutable_token_ids()->add_ids(2);  // the whole context
  score.set_top_logprobs(3);
  options_.default_tier = Tier::kFast;  // nothing is decoded: no predictor is needed
  const Request request = CheckScore(score, options_, model_)->front();
  EXPECT_FALSE(IsPredicted(request.sparsity.tier));
  EXPECT_TRUE(request.score);
  EXPECT_EQ(request.max_new_tokens, 0);
  EXPECT_EQ(request.score_top_logprobs, 3);
  EXPECT_EQ(request.prompt.size(), 64u);
}

TEST_F(ValidateTest, ScoresSeveralPromptsOrNone) {
  v1::ScoreRequest score;
  for (uint32_t i = 0; i < 3; ++i) {
    for (uint32_t k = 0; k <= i; ++k) score.add_prompts()->mutable_token_ids()->add_ids(5 + k);
  }
  score.mutable_prompts(4)->set_text("a</s>");
  score.set_parse_special_tokens(true);
  score.set_top_logprobs(2);
  score.mutable_scheduling()->set_urgency(v1::URGENCY_BATCH);
  const std::vector<Request> checked = CheckScore(score, options_, model_).value();
  ASSERT_EQ(checked.size(), 6u);
  EXPECT_THAT(checked[2].prompt, ElementsAre(6));
  EXPECT_EQ(checked[4].prompt.back(), 2);
  for (const Request& request : checked) {
    EXPECT_TRUE(request.score);
    EXPECT_EQ(request.score_top_logprobs, 2);
    EXPECT_EQ(request.urgency, Urgency::kBatch);
  }
  const auto message = [&] { return std::string(CheckScore(score, options_, model_).status().message()); };
  v1::ScoreRequest good = score;
  score.mutable_prompts(3)->mutable_token_ids()->add_ids(static_cast<uint32_t>(model_.vocab));
  EXPECT_THAT(message(), testing::StartsWith(absl::StrCat("prompts[3].token_ids.ids[1] is ", model_.vocab)));
  (score = good).mutable_prompts(1)->clear_prompt();
  EXPECT_EQ(message(), "prompts[1] is missing; give text or token_ids");
  (score = good).mutable_prompts(5)->mutable_token_ids()->clear_ids();
  EXPECT_THAT(message(), testing::StartsWith("prompts[5].token_ids.ids is empty"));
  score = good;
  for (int i = 0; i < 100; ++i) score.mutable_prompts(0)->mutable_token_ids()->add_ids(2);
  EXPECT_EQ(message(), "prompts[0].token_ids has 101 tokens; the model allows 64");
  (score = good).set_text("beside");
  EXPECT_THAT(message(), testing::StartsWith("prompts is given beside text or token_ids"));
  score = good;
  while (score.prompts_size() <= kMaxScorePrompts) *score.add_prompts() = good.prompts(0);
  EXPECT_THAT(message(), HasSubstr(absl::StrCat("prompts has ", kMaxScorePrompts + 1, " entries; at most ")));
}

TEST_F(ValidateTest, APromptMayBeAskedForBesideTheOutputOrAlone) {
  v1::GenerateRequest request = Good();
  request.mutable_stopping()->set_max_new_tokens(0);
  const auto message = [&] { return std::string(Check(request).status().message()); };
  EXPECT_THAT(message(), HasSubstr("stopping.max_new_tokens is 0; at least 1 is needed where neither"));
  request.mutable_output()->set_echo(true);
  EXPECT_TRUE(Check(request)->echo);
  EXPECT_FALSE(Check(request)->request.score);
  EXPECT_EQ(Check(request)->request.max_new_tokens, 0);
  request.mutable_output()->clear_echo();
  request.mutable_output()->set_prompt_top_logprobs(2);  // implies the others
  EXPECT_TRUE(Check(request)->request.score);
  EXPECT_FALSE(Check(request)->request.logprobs);
  EXPECT_EQ(Check(request)->request.score_top_logprobs, 2);
  EXPECT_EQ(Check(request)->request.top_logprobs, 0);
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_samples(2);
  EXPECT_THAT(message(), HasSubstr("sampling.samples is 2; a prompt without an output has one"));
  request.mutable_stopping()->set_max_new_tokens(1);
  EXPECT_TRUE(Check(request).ok());
  request.mutable_output()->set_prompt_top_logprobs(static_cast<uint32_t>(options_.max_top_logprobs) + 1);
  EXPECT_THAT(message(), HasSubstr("output.prompt_top_logprobs is 101; at most 100 is allowed"));
}

TEST_F(ValidateTest, KeepsTheEndOfAPromptWhereItIsAskedTo) {
  v1::GenerateRequest request = Good();
  request.clear_token_ids();
  for (uint32_t i = 0; i < 100; ++i) request.mutable_token_ids()->add_ids(3 + i);  // the context has 64
  EXPECT_THAT(std::string(Check(request).status().message()), HasSubstr("token_ids has 100 tokens"));
  const auto kept = [&](int32_t most) {
    request.set_truncate_prompt_tokens(most);
    const auto checked = Check(request);
    EXPECT_TRUE(checked.ok()) << checked.status();
    EXPECT_EQ(checked->request.prompt.back(), 102);
    return checked->request.prompt.size();
  };
  request.mutable_stopping()->set_max_new_tokens(1);
  for (const int32_t most : {1, 7, 64}) EXPECT_EQ(kept(most), static_cast<size_t>(most));
  EXPECT_EQ(kept(-1), 64u) << "the last token that is generated takes no place";
  request.mutable_stopping()->set_max_new_tokens(5);
  EXPECT_EQ(kept(-1), 60u);
  request.mutable_stopping()->clear_max_new_tokens();
  EXPECT_EQ(kept(-1), 33u) << "the default is more than half of the context";
  request.mutable_stopping()->set_max_new_tokens(5);
  for (const int32_t bad : {0, -2, 65, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    request.set_truncate_prompt_tokens(bad);
    EXPECT_THAT(std::string(Check(request).status().message()),
                HasSubstr(absl::StrCat("truncate_prompt_tokens is ", bad, "; it must be -1, or 1 ... 64")));
  }
  request.set_truncate_prompt_tokens(64);  // and 5 behind it
  EXPECT_THAT(std::string(Check(request).status().message()),
              HasSubstr("stopping.max_new_tokens is 5 after a prompt of 64"));
  request.set_truncate_prompt_tokens(-1);
  request.mutable_stopping()->set_max_new_tokens(1000);
  EXPECT_THAT(std::string(Check(request).status().message()), HasSubstr("stopping.max_new_tokens is 1000"));

  v1::ScoreRequest score;
  *score.mutable_token_ids() = request.token_ids();
  score.set_truncate_prompt_tokens(-1);
  EXPECT_EQ(CheckScore(score, options_, model_)->front().prompt.size(), 64u);
  score.set_truncate_prompt_tokens(3);
  EXPECT_EQ(CheckScore(score, options_, model_)->front().prompt, (std::vector<int32_t>{100, 101, 102}));
  std::string text;
  for (int i = 0; i < 3000; ++i) absl::StrAppend(&text, "word ");
  score.set_text(text);
  EXPECT_EQ(CheckScore(score, options_, model_)->front().prompt.size(), 3u) << "however long the text is";
}

}  // namespace
}  // namespace dejavu
