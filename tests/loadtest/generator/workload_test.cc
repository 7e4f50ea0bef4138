#include "loadtest/generator/workload.h"

#include <array>
#include <sstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "loadtest/generator/replay.h"

namespace dejavu {
namespace {

using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Lt;

v1::GetModelInfoResponse Model() {
  v1::GetModelInfoResponse model;
  model.set_vocabulary_size(100);
  model.set_context_tokens(128);
  model.set_bos_token_id(2);
  return model;
}

absl::StatusOr<Workload> Make(const RunOptions& options, std::vector<ReplayedRequest> replay = {}) {
  return Workload::Create(options, Model(), Prompts::Synthetic(100, 2), std::move(replay));
}

TEST(Workload, ARequestIsThatOfItsSeedPhaseAndNumber) {
  RunOptions options;
  options.prompt_tokens = "uniform:4:32";
  options.tier = "dense=1,balanced=1";
  const auto one = Make(options), same = Make(options);
  options.seed = 2;
  const auto other = Make(options);
  ASSERT_TRUE(one.ok() && same.ok() && other.ok());
  const std::string seventh = one->Make(1, 7).message.SerializeAsString();
  EXPECT_EQ(seventh, same->Make(1, 7).message.SerializeAsString());
  EXPECT_NE(seventh, one->Make(1, 8).message.SerializeAsString());
  EXPECT_NE(seventh, one->Make(0, 7).message.SerializeAsString());
  EXPECT_NE(seventh, other->Make(1, 7).message.SerializeAsString());
}

TEST(Workload, ARequestIsWhatTheFlagsSay) {
  RunOptions options;
  options.prompt_tokens = "9";
  options.output_tokens = "5";
  options.tier = "fast";
  options.urgency = "batch";
  options.priority = "-3";
  options.tenant = "acme";
  const auto workload = Make(options);
  ASSERT_TRUE(workload.ok()) << workload.status();
  const PlannedRequest planned = workload->Make(1, 0);
  const v1::GenerateRequest& message = planned.message;
  EXPECT_EQ(planned.kind, RequestKind::kNormal);
  EXPECT_EQ(planned.tenant, "acme");
  EXPECT_EQ(message.token_ids().ids_size(), 9);
  EXPECT_EQ(message.token_ids().ids(0), 2u);
  EXPECT_THAT(message.token_ids().ids(), Each(Lt(100u)));
  EXPECT_EQ(message.stopping().max_new_tokens(), 5u);
  EXPECT_TRUE(message.stopping().ignore_eos());
  EXPECT_EQ(message.sparsity().tier(), v1::TIER_FAST);
  EXPECT_EQ(message.scheduling().urgency(), v1::URGENCY_BATCH);
  EXPECT_EQ(message.scheduling().priority(), -3);
  EXPECT_FALSE(message.scheduling().prefix_cache());
}

TEST(Workload, MisbehavesInTheSharesAskedFor) {
  RunOptions options;
  options.cancel_share = 0.1;
  options.slow_reader_share = 0.2;
  options.bad_share = 0.3;
  const auto workload = Make(options);
  ASSERT_TRUE(workload.ok());
  std::array<int, 4> kinds{};
  for (int i = 0; i < 5'000; ++i) ++kinds[static_cast<size_t>(workload->Make(1, i).kind)];
  EXPECT_NEAR(kinds[static_cast<size_t>(RequestKind::kNormal)], 2'000, 150);
  EXPECT_NEAR(kinds[static_cast<size_t>(RequestKind::kCancelled)], 500, 100);
  EXPECT_NEAR(kinds[static_cast<size_t>(RequestKind::kSlowReader)], 1'000, 120);
  EXPECT_NEAR(kinds[static_cast<size_t>(RequestKind::kBad)], 1'500, 130);
}

TEST(Workload, RefusesFlagsThatMakeNoSense) {
  const auto message_of = [](auto set) {
    RunOptions options;
    set(&options);
    return std::string(Make(options).status().message());
  };
  EXPECT_THAT(message_of([](RunOptions* o) { o->prompt_tokens = "x"; }), HasSubstr("--prompt-tokens"));
  EXPECT_THAT(message_of([](RunOptions* o) { o->output_tokens = "97"; }), HasSubstr("128"));
  EXPECT_THAT(message_of([](RunOptions* o) { o->tier = "best"; }), HasSubstr("best"));
  EXPECT_THAT(message_of([](RunOptions* o) { o->urgency = "now"; }), HasSubstr("now"));
  EXPECT_THAT(message_of([](RunOptions* o) { o->priority = "101"; }), HasSubstr("--priority"));
  EXPECT_THAT(message_of([](RunOptions* o) { o->cancel_share = o->bad_share = 0.6; }), HasSubstr("more than 1"));
}

TEST(Prompts, OfACorpusAreWordsOfItOfAboutTheRightLength) {
  std::string text;
  for (int i = 0; i < 2'000; ++i) text += "w\xC3\xB6rd" + std::to_string(i % 10) + " ";
  const auto prompts = Prompts::Corpus(text, 3.5);  // half a word a token
  ASSERT_TRUE(prompts.ok());
  std::mt19937_64 random(1);
  for (int i = 0; i < 200; ++i) {
    v1::GenerateRequest request;
    prompts->Fill(20, &random, &request);
    EXPECT_NE(text.find(request.text()), std::string::npos);
    EXPECT_EQ(request.text()[0], 'w') << request.text();
    EXPECT_NEAR(static_cast<double>(request.text().size()), 70.0, 1.0);
  }
  EXPECT_FALSE(Prompts::Corpus("word", 4.0).ok());
  EXPECT_FALSE(Prompts::Corpus("a \xFF b", 4.0).ok());
}

absl::StatusOr<std::vector<ReplayedRequest>> Parse(const std::string& text) {
  std::istringstream in(text);
  return ParseReplay(&in, "trace");
}

TEST(Replay, ReadsCsv) {
  const auto requests =
      Parse("offset_s,prompt_tokens,max_new_tokens,seed,tier\n2.5,10,20,18446744073709551615,fast\n1.5,3,4,,\n");
  ASSERT_TRUE(requests.ok()) << requests.status();
  ASSERT_EQ(requests->size(), 2u);
  EXPECT_EQ((*requests)[0].offset_s, 0.0);  // in order of time, from the first
  EXPECT_EQ((*requests)[0].prompt_tokens, 3);
  EXPECT_FALSE((*requests)[0].seed.has_value());
  EXPECT_EQ((*requests)[1].offset_s, 1.0);
  EXPECT_EQ((*requests)[1].seed, 18446744073709551615u);
  EXPECT_EQ((*requests)[1].tier, "fast");
}

TEST(Replay, ReadsJsonLinesAndTheDaemonsLog) {
  const auto requests = Parse(R"({"offset_s":0,"prompt_tokens":1,"max_new_tokens":2,"seed":7,"tier":"dense"})"
                              "\n"
                              R"({"offset_s":0.25,"prompt_tokens":5,"max_new_tokens":6})");
  ASSERT_TRUE(requests.ok()) << requests.status();
  EXPECT_EQ((*requests)[0].seed, 7u);
  EXPECT_EQ((*requests)[1].offset_s, 0.25);

  const auto logged = Parse(
      R"({"time":"...","level":"info","event":"engine","running":3})"
      "\n"
      R"({"level":"info","event":"request","method":"Tokenize","code":"OK","total_ms":1.0})"
      "\n"
      R"({"level":"info","event":"request","tenant":"acme","tier":"exact","priority":"batch","samples":2,)"
      R"("prompt_tokens":8,"max_new_tokens":20,"seed":9,"arrival_s":1795205403.5,"total_ms":1.0})"
      "\n"
      R"({"level":"info","event":"request","prompt_tokens":4,"max_new_tokens":1,"seed":1,"arrival_s":1795205403.25})");
  ASSERT_TRUE(logged.ok()) << logged.status();
  ASSERT_EQ(logged->size(), 2u);
  EXPECT_EQ((*logged)[0].prompt_tokens, 4);
  EXPECT_EQ((*logged)[1].offset_s, 0.25);
  EXPECT_EQ((*logged)[1].prompt_tokens, 4);  // the log's are sums over the samples
  EXPECT_EQ((*logged)[1].urgency, "batch");
  EXPECT_EQ((*logged)[1].tenant, "acme");
}

TEST(Replay, NamesTheLineThatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "no request"},
      {"offset_s,prompt_tokens\n", "trace:1: the column max_new_tokens"},
      {"offset_s,prompt_tokens,max_new_tokens,text\n", "'text'"},
      {"offset_s,prompt_tokens,max_new_tokens\n0,1,1\n0,1\n", "trace:3: 2 cells"},
      {"offset_s,prompt_tokens,max_new_tokens\n0,x,1\n", "trace:2: prompt_tokens is 'x'"},
      {"offset_s,prompt_tokens,max_new_tokens\n0,0,1\n", "prompt_tokens is 0"},
      {"offset_s,prompt_tokens,max_new_tokens,tier\n0,1,1,best\n", "'best'"},
      {"{\"offset_s\":0,\"prompt_tokens\":1}", "trace:1: there is no max_new_tokens"},
      {"{\"offset_s\":0,\"prompt_tokens\":\"1\",\"max_new_tokens\":1}", "prompt_tokens is \"1\""},
      {"{", "not a JSON object"},
  };
  for (const auto& [text, message] : cases) {
    EXPECT_THAT(std::string(Parse(text).status().message()), HasSubstr(message)) << text;
  }
}

TEST(Replay, OverridesWhatTheFlagsDraw) {
  ReplayedRequest replayed;
  replayed.prompt_tokens = 3;
  replayed.max_new_tokens = 4;
  replayed.seed = 11;
  replayed.tier = "high";
  RunOptions options;
  options.tier = "dense";
  const auto workload = Make(options, {replayed});
  ASSERT_TRUE(workload.ok());
  const v1::GenerateRequest message = workload->Make(1, 0).message;
  EXPECT_EQ(message.token_ids().ids_size(), 3);
  EXPECT_EQ(message.stopping().max_new_tokens(), 4u);
  EXPECT_EQ(message.sampling().seed(), 11u);
  EXPECT_EQ(message.sparsity().tier(), v1::TIER_HIGH);
  replayed.prompt_tokens = 126;
  EXPECT_THAT(std::string(Make(options, {replayed}).status().message()), HasSubstr("126 + 4"));
}

}  // namespace
}  // namespace dejavu
