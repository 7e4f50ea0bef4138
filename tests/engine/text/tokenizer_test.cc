#include "engine/text/tokenizer.h"

#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using nlohmann::json;
using testing::ElementsAre;

constexpr char kOptTokenizer[] = TESTDATA "/opt-tokenizer";

std::string ReadFile(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  EXPECT_TRUE(stream) << file;
  return std::string(std::istreambuf_iterator<char>(stream), {});
}

std::unique_ptr<Tokenizer> LoadOrDie(const std::string& directory) {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(directory);
  if (!tokenizer.ok()) {
    ADD_FAILURE() << tokenizer.status();
    abort();
  }
  return *std::move(tokenizer);
}

const Tokenizer& Opt() {
  static const Tokenizer& tokenizer = *LoadOrDie(kOptTokenizer).release();
  return tokenizer;
}

struct Golden {
  std::string text;
  std::vector<int32_t> ids;
};

std::vector<Golden> Goldens() {
  std::vector<Golden> goldens;
  std::ifstream stream(std::string(kOptTokenizer) + "/tokenizer-golden.jsonl");
  for (std::string line; std::getline(stream, line);) {
    const json entry = json::parse(line);
    goldens.push_back({entry["text"], entry["ids"]});
  }
  return goldens;
}

// One JSON form out of the two files; `merges_as_pairs`: as ["a", "b"], else as "a b".
std::string TokenizerJson(const std::string& directory, bool merges_as_pairs) {
  json merges = json::array();
  std::ifstream stream(directory + "/merges.txt");
  for (std::string line; std::getline(stream, line);) {
    if (line.rfind("#version", 0) == 0) continue;
    const size_t space = line.find(' ');
    merges.push_back(merges_as_pairs ? json{line.substr(0, space), line.substr(space + 1)} : json(line));
  }
  json root;
  root["model"] = {{"type", "BPE"}, {"vocab", json::parse(ReadFile(directory + "/vocab.json"))}, {"merges", merges}};
  root["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
  root["added_tokens"] = {{{"id", 50264}, {"content", "<mask>"}, {"special", true}},
                          {{"id", 50265}, {"content", "<|new|>"}, {"special", true}}};
  return root.dump();
}

// Bytes that lean towards what tells tokenizers apart: spaces, quotes, digits, borders of UTF-8.
std::string RandomBytes(std::mt19937& random, size_t size) {
  constexpr absl::string_view kUsual = " \n\t'stll09az\xC3\xA9\xE2\x82\xAC\xF0\x9F\x8E\x88";
  std::string bytes;
  while (bytes.size() < size) {
    bytes.push_back(random() % 4 ? kUsual[random() % kUsual.size()] : static_cast<char>(random()));
  }
  return bytes;
}

std::string AllBytes(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  std::string bytes;
  for (const int32_t id : ids) bytes.append(tokenizer.Bytes(id).data(), tokenizer.Bytes(id).size());
  return bytes;
}

TEST(Tokenizer, EncodesEveryGoldenAsHuggingFaceDoes) {
  const std::vector<Golden> goldens = Goldens();
  ASSERT_EQ(goldens.size(), 295u);
  for (const Golden& golden : goldens) EXPECT_EQ(Opt().Encode(golden.text), golden.ids) << golden.text;
}

TEST(Tokenizer, DecodesEveryGoldenBackToItsText) {
  for (const Golden& golden : Goldens()) EXPECT_EQ(Opt().Decode(golden.ids, true), golden.text);
}

TEST(Detokenizer, StreamsEveryGoldenInWholeCharactersAsSoonAsTheyAreComplete) {
  for (const Golden& golden : Goldens()) {
    Detokenizer detokenizer(Opt(), true);
    std::string streamed;
    size_t bytes = 0;
    for (const int32_t id : golden.ids) {
      detokenizer.Append(id, &streamed);
      bytes += Opt().Bytes(id).size();
      size_t border = bytes;  // the last border of characters that the bytes so far reach
      while (border < golden.text.size() && (golden.text[border] & 0xC0) == 0x80) --border;
      ASSERT_EQ(streamed, golden.text.substr(0, border));
    }
    detokenizer.Flush(&streamed);
    EXPECT_EQ(streamed, golden.text);
  }
}

TEST(Tokenizer, PutsTheEndTokenBeforeAPrompt) {
  EXPECT_THAT(Opt().EncodePrompt("Hello"), ElementsAre(2, 31414));
  EXPECT_THAT(Opt().EncodePrompt(""), ElementsAre(2));
}

TEST(Tokenizer, KnowsItsVocabulary) {
  EXPECT_EQ(Opt().vocab_size(), 50265);
  EXPECT_TRUE(Opt().unused_ids().empty());
  EXPECT_THAT(Opt().before_prompt(), ElementsAre(2));
  EXPECT_TRUE(Opt().behind_prompt().empty());
  EXPECT_EQ(Opt().Piece(2), "</s>");
  EXPECT_EQ(Opt().Piece(20920), "ĠHello");
  EXPECT_EQ(Opt().Bytes(20920), " Hello");
  for (const int32_t id : {-1, 50265, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(Opt().Piece(id), "");
    EXPECT_EQ(Opt().Bytes(id), "");
    EXPECT_FALSE(Opt().IsSpecial(id));
  }
}

// facebook/opt names </s> and <pad>, no others.
TEST(Tokenizer, SpecialTokensAreTextUnlessTheyAreParsed) {
  for (const int32_t id : {1, 2}) EXPECT_TRUE(Opt().IsSpecial(id));
  for (const int32_t id : {0, 3, 4}) EXPECT_FALSE(Opt().IsSpecial(id));
  const std::string text = "<s></s><pad><unk></s>";
  for (const int32_t id : Opt().Encode(text)) EXPECT_FALSE(Opt().IsSpecial(id)) << id;
  const std::vector<int32_t> parsed = Opt().Encode(text, /*parse_special_tokens=*/true);
  EXPECT_EQ(Opt().Decode(parsed, false), text);
  EXPECT_EQ(Opt().Decode(parsed, true), "<s><unk>");
  EXPECT_THAT(Opt().EncodePrompt("</s>", true), ElementsAre(2, 2));
  EXPECT_EQ(Opt().SpecialId("</s>"), 2);
  EXPECT_EQ(Opt().SpecialId("<s>"), -1);
  EXPECT_EQ(Opt().SpecialId("</s"), -1);
}

TEST(Tokenizer, DecodesSpecialTokensAsWrittenOrNotAtAll) {
  EXPECT_EQ(Opt().Decode({2, 31414, 2, 6}, true), "Hello,");
  EXPECT_EQ(Opt().Decode({2, 31414, 2, 6}, false), "</s>Hello</s>,");
}

TEST(Tokenizer, BothFormsOfFilesGiveTheSameIds) {
  for (const bool merges_as_pairs : {false, true}) {
    ScratchDirectory directory;
    directory.Write("tokenizer.json", TokenizerJson(kOptTokenizer, merges_as_pairs));
    directory.Write("tokenizer_config.json", ReadFile(std::string(kOptTokenizer) + "/tokenizer_config.json"));
    const std::unique_ptr<Tokenizer> tokenizer = LoadOrDie(directory.path());
    EXPECT_EQ(tokenizer->vocab_size(), 50266);
    EXPECT_TRUE(tokenizer->IsSpecial(50264));
    EXPECT_TRUE(tokenizer->IsSpecial(50265));
    EXPECT_EQ(tokenizer->Piece(50265), "<|new|>");
    for (const Golden& golden : Goldens()) EXPECT_EQ(tokenizer->Encode(golden.text), golden.ids) << golden.text;
  }
}

TEST(Tokenizer, TheEmbeddedModelsFormsOfFilesAgree) {
  ScratchDirectory directory;
  for (const char* name : {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}) {
    directory.Write(name, ReadFile(absl::StrCat(EMBEDDED_MODEL, "/", name)));
  }
  const std::unique_ptr<Tokenizer> from_files = LoadOrDie(directory.path());
  const std::unique_ptr<Tokenizer> from_json = LoadOrDie(EMBEDDED_MODEL);
  EXPECT_EQ(from_json->vocab_size(), from_files->vocab_size());
  EXPECT_EQ(from_json->EncodePrompt("It was"), from_files->EncodePrompt("It was"));
  for (const Golden& golden : Goldens()) {
    const std::vector<int32_t> ids = from_files->Encode(golden.text);
    EXPECT_EQ(from_json->Encode(golden.text), ids);
    EXPECT_EQ(from_files->Decode(ids, true), golden.text);
  }
  std::mt19937 random(11);
  for (int round = 0; round < 300; ++round) {
    const std::string text = RandomBytes(random, random() % 60);
    EXPECT_EQ(from_json->Encode(text), from_files->Encode(text));
  }
}

TEST(Tokenizer, TheVersionLineOfMergesIsOptional) {
  ScratchDirectory directory;
  const std::string merges = ReadFile(std::string(kOptTokenizer) + "/merges.txt");
  directory.Write("vocab.json", ReadFile(std::string(kOptTokenizer) + "/vocab.json"));
  directory.Write("merges.txt", merges.substr(merges.find('\n') + 1));
  const std::unique_ptr<Tokenizer> tokenizer = LoadOrDie(directory.path());
  for (const Golden& golden : Goldens()) EXPECT_EQ(tokenizer->Encode(golden.text), golden.ids) << golden.text;
}

TEST(Tokenizer, KeepsAnyBytes) {
  std::mt19937 random(5);
  for (int round = 0; round < 2000; ++round) {
    const std::string bytes = RandomBytes(random, random() % 40);
    EXPECT_EQ(AllBytes(Opt(), Opt().Encode(bytes)), bytes);
  }
  for (const char* bytes : {"\x80", "\xFF", "a\xC3", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xC0\x80", "\xE2\x82"}) {
    EXPECT_EQ(AllBytes(Opt(), Opt().Encode(bytes)), bytes);
  }
}

// Quadratic work would take minutes here.
TEST(Tokenizer, TakesLongTextsWithoutABreak) {
  constexpr size_t kSize = 1 << 20;
  for (const char* unit : {"x", " ", "!", "7", "ab", "é", "世", "🎈", "\xFF", "\n", "a'"}) {
    std::string text;
    while (text.size() < kSize) text += unit;
    text += "x";
    const std::vector<int32_t> ids = Opt().Encode(text);
    EXPECT_EQ(AllBytes(Opt(), ids), text) << unit;
  }
}

TEST(Detokenizer, HoldsBackOnlyWhatMayBecomeACharacter) {
  struct Case {
    const char* bytes;
    const char* at_once;
    const char* flushed;
  };
  const Case cases[] = {
      {"a", "a", ""},
      {"\xC3", "", "\uFFFD"},
      {"a\xE2\x82", "a", "\uFFFD"},
      {"\xF0\x9F\x8E", "", "\uFFFD"},
      {"\xE2\x82\xAC", "€", ""},
      {"\x80", "\uFFFD", ""},
      {"\xC0\xAF", "\uFFFD\uFFFD", ""},            // overlong: no lead byte
      {"\xE0\x80\xAF", "\uFFFD\uFFFD\uFFFD", ""},  // overlong
      {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD", ""},  // surrogate
      {"\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD", ""},
      {"\xF1\x80\x80\xE1\x80\xC2\x62",
       "\uFFFD\uFFFD\uFFFD"
       "b",
       ""},  // Unicode 15, table 3-11
      {"\xE2\x82\xE2\x82\xAC", "\uFFFD€", ""},
      {"\xF5\xFF", "\uFFFD\uFFFD", ""},
  };
  for (const Case& c : cases) {
    Detokenizer detokenizer(Opt(), true);
    std::string text;
    // Byte by byte, so that every border falls between tokens.
    for (const char* byte = c.bytes; *byte; ++byte) {
      const std::vector<int32_t> ids = Opt().Encode(absl::string_view(byte, 1));
      ASSERT_EQ(ids.size(), 1u);
      detokenizer.Append(ids[0], &text);
    }
    EXPECT_EQ(text, c.at_once) << testing::PrintToString(std::string(c.bytes));
    std::string rest;
    detokenizer.Flush(&rest);
    EXPECT_EQ(rest, c.flushed) << testing::PrintToString(std::string(c.bytes));
    detokenizer.Flush(&rest);
    EXPECT_EQ(rest, c.flushed);
  }
}

// Tokens that are found in a text: matches that fail late, overlap, or take the spaces beside them.
TEST(Tokenizer, FindsAddedTokensInLinearTime) {
  ScratchDirectory directory;
  for (const char* name : {"vocab.json", "merges.txt"}) {
    directory.Write(name, ReadFile(absl::StrCat(kOptTokenizer, "/", name)));
  }
  json added = json::object();
  int id = 50265;
  const auto add = [&](const std::string& content, bool strips) {
    added[std::to_string(id++)] = {{"content", content}, {"lstrip", strips}, {"rstrip", strips}, {"special", false}};
  };
  add(std::string(10000, 'a') + "b", false);
  add(std::string(5000, 'a') + "c", false);
  add(" ", true);
  add("\n", true);
  directory.Write("tokenizer_config.json", json{{"added_tokens_decoder", added}}.dump());
  const std::unique_ptr<Tokenizer> tokenizer = LoadOrDie(directory.path());
  constexpr size_t kSize = 1 << 20;
  for (const char* unit : {"a", " ", "\n", " \n", "ab"}) {
    std::string text;
    while (text.size() < kSize) text += unit;
    EXPECT_GE(tokenizer->Encode(text).size(), 1u) << unit;
  }
  EXPECT_THAT(tokenizer->Encode(std::string(20000, 'a') + "b  \n x"), testing::Contains(50265).Times(1));
  EXPECT_GT(tokenizer->longest_token_bytes(), kSize);
}

TEST(Detokenizer, ContinuesACharacterThatThePromptBegins) {
  const int32_t first = Opt().Encode("\xC3")[0], second = Opt().Encode("\xA9")[0], a = Opt().Encode("a")[0];
  struct Case {
    std::vector<int32_t> prompt, output;
    std::string text;
  };
  const Case cases[] = {
      {{2, a, first}, {second, a}, "\u00E9a"},
      {{2, a, first, 2}, {second}, "\u00E9"},
      {{first}, {a}, "\uFFFDa"},
      {{first, second}, {a}, "a"},
      {{second}, {second}, "\uFFFD"},
      {{}, {first, second}, "\u00E9"},
      {{a, first}, {}, "\uFFFD"},
  };
  for (const Case& c : cases) {
    Detokenizer detokenizer(Opt(), true);
    detokenizer.Prime(c.prompt);
    std::string text;
    for (const int32_t id : c.output) detokenizer.Append(id, &text);
    detokenizer.Flush(&text);
    EXPECT_EQ(text, c.text);
  }
}

// All ids decoded at once, and cut behind the prompt's last whole character.
TEST(Detokenizer, WhatFollowsAPromptIsWhatDecodingAllGives) {
  std::mt19937 random(12);
  for (int round = 0; round < 500; ++round) {
    std::vector<int32_t> ids(random() % 24);
    const std::string bytes = RandomBytes(random, ids.size());
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = random() % 9 ? Opt().Encode(bytes.substr(i, 1))[0] : 2;
    const size_t cut = ids.empty() ? 0 : random() % ids.size();
    Detokenizer whole(Opt(), true), output(Opt(), true);
    std::string prompt, text;
    for (size_t i = 0; i < cut; ++i) whole.Append(ids[i], &prompt);
    output.Prime(absl::MakeConstSpan(ids).subspan(0, cut));
    for (size_t i = cut; i < ids.size(); ++i) output.Append(ids[i], &text);
    output.Flush(&text);
    EXPECT_EQ(prompt + text, Opt().Decode(ids, true));
  }
}

TEST(Detokenizer, SkippedSpecialTokensDoNotCutACharacterButWrittenOnesDo) {
  const int32_t first = Opt().Encode("\xC3")[0];
  const int32_t second = Opt().Encode("\xA9")[0];
  EXPECT_EQ(Opt().Decode({first, 2, second}, true), "é");
  EXPECT_EQ(Opt().Decode({first, 2, second}, false), "\uFFFD</s>\uFFFD");
}

TEST(Detokenizer, AnyIdsGiveTheSameTextStreamedAndAtOnce) {
  std::mt19937 random(9);
  for (int round = 0; round < 300; ++round) {
    std::vector<int32_t> ids(random() % 30);
    for (int32_t& id : ids) id = random() % 3 ? random() % 50265 : Opt().Encode(std::string(1, random()))[0];
    Detokenizer detokenizer(Opt(), true);
    std::string streamed;
    for (const int32_t id : ids) {
      std::string piece;
      detokenizer.Append(id, &piece);
      ASSERT_NO_THROW(json(piece).dump()) << "not whole UTF-8";  // dump refuses ill-formed text
      streamed += piece;
    }
    detokenizer.Flush(&streamed);
    EXPECT_EQ(streamed, Opt().Decode(ids, true));
  }
}

}  // namespace
}  // namespace dejavu
