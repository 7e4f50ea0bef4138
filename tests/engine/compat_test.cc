// Directories as users have them, and what Transformers makes of each (tests/parity/make_compat.py): they load with the
// same results here, or are refused with file, field and reason.
#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "engine/formats/checkpoint.h"
#include "engine/text/tokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/engine/serving/collecting_sink.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using nlohmann::json;
using testing::HasSubstr;

constexpr float kTolerance = 0.002f;

std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

std::string CompatPath(const std::string& name) { return absl::StrCat(TESTDATA, "/compat/", name); }

std::vector<std::string> CompatCases() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(CompatPath(""))) {
    if (exists(entry.path() / "case.json")) names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

class Compat : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    record_ = json::parse(ReadText(CompatPath(GetParam()) + "/case.json"));
    const std::string base = CompatPath("base-" + record_["base"].get<std::string>());
    const auto options = std::filesystem::copy_options::recursive | std::filesystem::copy_options::overwrite_existing;
    std::filesystem::copy(base, directory_.path(), options);
    for (const auto& name : record_.value("absent", json::array())) {
      std::filesystem::remove(directory_.Path(name.get<std::string>()));
    }
    const json copies = record_.value("copies", json::object());
    for (const auto& [name, of] : copies.items()) {
      const std::filesystem::path to = directory_.Path(name);
      std::filesystem::create_directories(to.parent_path());
      std::filesystem::copy(base + "/" + of.get<std::string>(), to, options);
    }
    std::filesystem::copy(CompatPath(GetParam()), directory_.path(), options);
    std::filesystem::remove(directory_.Path("case.json"));
  }

  // True where `answer` is a result that is expected here too. What is refused names file, field and reason; where the
  // reference would load it, the documentation says why.
  bool ExpectsToLoad(const json& answer, const absl::Status& status) {
    if (!record_.contains("refused")) {
      EXPECT_FALSE(answer.contains("error")) << "say with which words it is refused here";
      EXPECT_TRUE(status.ok()) << status;
      return status.ok();
    }
    EXPECT_THAT(status.code(), testing::AnyOf(absl::StatusCode::kInvalidArgument, absl::StatusCode::kNotFound));
    for (const auto& words : record_["refused"]) {
      EXPECT_THAT(std::string(status.message()), HasSubstr(words.get<std::string>()));
    }
    if (!answer.contains("error")) ExpectDecided();
    return false;
  }

  // The documentation says why this is not as in the reference.
  void ExpectDecided() { EXPECT_THAT(ReadText(MODELS_PAGE), HasSubstr(record_.value("decision", "a decision"))); }

  // What is expected here, where that is not in every field what the reference answers.
  json Expected(json answer) {
    if (!record_.contains("here")) return answer;
    ExpectDecided();
    answer.update(record_["here"]);
    return answer;
  }

  const ScratchDirectory directory_;
  json record_;
};

absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const std::string& model, int ranks) {
  EngineOptions options;
  options.model = model;
  options.device = "cpu";
  options.threads = ranks;
  options.tensor_parallel = ranks;
  options.pin_threads = false;
  options.scheduler.max_batch = 2;
  options.kv.dtype = "fp32";  // as the reference computes; what fp16 costs is another question
  return Engine::Create(options, 0, nullptr);
}

std::vector<CollectingSink::HeardToken> Hear(Engine& engine, const Request& request) {
  const auto sink = std::make_shared<CollectingSink>();
  const auto id = engine.Submit(request, sink);
  EXPECT_TRUE(id.ok()) << id.status();
  if (id.ok()) sink->WaitForFinish();
  return sink->tokens();
}

std::vector<int32_t> IdsOf(const std::vector<CollectingSink::HeardToken>& tokens) {
  std::vector<int32_t> ids;
  for (const auto& token : tokens) ids.push_back(token.id);
  return ids;
}

void ExpectSameModel(Engine& engine, const json& answer) {
  Request score;
  score.prompt = answer["prompt"].get<std::vector<int32_t>>();
  score.score = true;
  const auto scored = Hear(engine, score);
  ASSERT_EQ(scored.size(), score.prompt.size());
  for (size_t i = 1; i < scored.size(); ++i) {
    EXPECT_NEAR(scored[i].logprob, answer["logprobs"][i - 1].get<float>(), kTolerance) << "token " << i;
  }

  Request greedy;
  greedy.prompt = score.prompt;
  greedy.max_new_tokens = static_cast<int32_t>(answer["greedy"].size());
  greedy.ignore_eos = true;
  greedy.logprobs = true;
  greedy.top_logprobs = static_cast<int32_t>(answer["last"].size());
  const auto tokens = Hear(engine, greedy);
  EXPECT_EQ(IdsOf(tokens), answer["greedy"].get<std::vector<int32_t>>());
  ASSERT_FALSE(tokens.empty());
  for (const TokenLogprob& of : tokens[0].top) {
    EXPECT_NEAR(of.logprob, answer["last"][of.id].get<float>(), kTolerance) << "id " << of.id;
  }

  greedy.ignore_eos = false;
  EXPECT_EQ(IdsOf(Hear(engine, greedy)), answer["generated"].get<std::vector<int32_t>>());
  // None of them comes before min_new_tokens.
  greedy.min_new_tokens = greedy.max_new_tokens;
  for (const auto& token : Hear(engine, greedy)) {
    EXPECT_THAT(engine.model().eos_tokens, testing::Not(testing::Contains(token.id)));
  }
  EXPECT_EQ(engine.model().eos_tokens, answer["end_tokens"].get<std::vector<int32_t>>());
}

std::vector<std::string> NamesOf(const Checkpoint& checkpoint) {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : checkpoint.tensors()) names.push_back(name);
  for (const auto& [name, tensor] : checkpoint.foreign()) names.push_back(name);
  return names;
}

// Each text's ids, and the texts of ids.
void ExpectSameTokenizer(const Tokenizer& tokenizer, const json& questions, const json& answer) {
  for (size_t i = 0; i < questions["texts"].size(); ++i) {
    const auto text = questions["texts"][i].get<std::string>();
    EXPECT_EQ(tokenizer.EncodePrompt(text, true), answer["parsed"][i].get<std::vector<int32_t>>()) << text;
    EXPECT_EQ(tokenizer.EncodePrompt(text, false), answer["text"][i].get<std::vector<int32_t>>()) << text;
  }
  for (size_t i = 0; i < questions["ids"].size(); ++i) {
    const auto ids = questions["ids"][i].get<std::vector<int32_t>>();
    EXPECT_EQ(tokenizer.Decode(ids, false), answer["kept"][i].get<std::string>()) << questions["ids"][i];
    EXPECT_EQ(tokenizer.Decode(ids, true), answer["skipped"][i].get<std::string>()) << questions["ids"][i];
  }
}

TEST_P(Compat, LoadsWithTheSameResultsOrIsRefusedByName) {
  if (record_.contains("model")) {
    const bool is_of_weights = !absl::StartsWith(GetParam(), "config-") && !absl::StartsWith(GetParam(), "end-");
    for (int ranks = 1; ranks <= (is_of_weights ? 2 : 1); ++ranks) {
      SCOPED_TRACE(testing::Message() << ranks << " ranks");
      const auto engine = MakeEngine(directory_.path(), ranks);
      if (ExpectsToLoad(record_["model"], engine.status())) ExpectSameModel(**engine, Expected(record_["model"]));
    }
  }
  if (record_.contains("file")) {
    const auto checkpoint = Checkpoint::Open(directory_.path());
    if (ExpectsToLoad(record_["file"], checkpoint.status())) {
      std::vector<std::string> names = NamesOf(*checkpoint);
      std::sort(names.begin(), names.end());
      EXPECT_EQ(names, record_["file"]["names"].get<std::vector<std::string>>());
    }
  }
  if (record_.contains("tokenizer")) {
    const auto tokenizer = Tokenizer::Load(directory_.path());
    if (ExpectsToLoad(record_["tokenizer"], tokenizer.status())) {
      const json questions = json::parse(ReadText(directory_.Path("questions.json")));
      ExpectSameTokenizer(**tokenizer, questions, record_["tokenizer"]);
    }
  }
  EXPECT_TRUE(record_.contains("model") || record_.contains("file") || record_.contains("tokenizer"));
}

INSTANTIATE_TEST_SUITE_P(All, Compat, testing::ValuesIn(CompatCases()), [](const auto& info) {
  std::string name = info.param;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !std::isalnum(static_cast<unsigned char>(c)); }, '_');
  return name;
});

TEST(CompatCases, AreManyAndSmall) {
  EXPECT_GE(CompatCases().size(), 60u);
  uintmax_t bytes = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(CompatPath(""))) {
    if (entry.is_regular_file()) bytes += entry.file_size();
  }
  EXPECT_LT(bytes, 1u << 20);
}

}  // namespace
}  // namespace dejavu
