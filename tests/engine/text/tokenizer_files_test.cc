// Tokenizer files that are odd, broken or hostile, through Tokenizer::Load.
#include <sys/stat.h>

#include <functional>
#include <string>

#include "engine/text/tokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

// A vocabulary of the four special tokens, the 256 bytes, and "ab", "abc".
json SmallVocab() {
  json vocab = {{"<s>", 0}, {"<pad>", 1}, {"</s>", 2}, {"<unk>", 3}, {"ab", 260}, {"abc", 261}};
  int id = 4;
  for (int c = 0x21; c < 0x144; ++c) {
    if ((c >= 0x7F && c <= 0xA0) || c == 0xAD) continue;
    const std::string symbol = c < 0x80
                                   ? std::string(1, static_cast<char>(c))
                                   : std::string{static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 63))};
    vocab[symbol] = id++;
  }
  return vocab;
}

json SmallTokenizer() {
  return {{"model", {{"type", "BPE"}, {"vocab", SmallVocab()}, {"merges", {"a b", "ab c"}}}},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}}};
}

class TokenizerFiles : public testing::Test {
 protected:
  void WriteSmallFiles() {
    directory_.Write("vocab.json", SmallVocab().dump());
    directory_.Write("merges.txt", "#version: 0.2\na b\nab c\n");
  }
  std::unique_ptr<Tokenizer> LoadOrDie() {
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(directory_.path());
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    return *std::move(tokenizer);
  }
  void ExpectRefused(const std::string& file, const std::string& reason) {
    const absl::Status status = Tokenizer::Load(directory_.path()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(directory_.path() + "/" + file), HasSubstr(reason)));
    EXPECT_LT(status.message().size(), 1000u);
  }
  // Loads small files of which `change` has changed the tokenizer.json.
  void ExpectChangeRefused(const std::function<void(json&)>& change, const std::string& reason) {
    json root = SmallTokenizer();
    change(root);
    directory_.Write("tokenizer.json", root.dump());
    ExpectRefused("tokenizer.json", reason);
  }
  void ExpectVocabRefused(const std::string& vocab, const std::string& reason) {
    directory_.Write("vocab.json", vocab);
    directory_.Write("merges.txt", "a b\n");
    ExpectRefused("vocab.json", reason);
  }
  void ExpectMergesRefused(const std::string& merges, const std::string& reason) {
    directory_.Write("vocab.json", SmallVocab().dump());
    directory_.Write("merges.txt", merges);
    ExpectRefused("merges.txt", reason);
  }

  ScratchDirectory directory_;
};

TEST_F(TokenizerFiles, AreNotFoundInAnEmptyDirectoryOrNone) {
  EXPECT_EQ(Tokenizer::Load(directory_.path()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Tokenizer::Load(directory_.path() + "/none").status().code(), absl::StatusCode::kNotFound);
  directory_.Write("vocab.json", SmallVocab().dump());
  EXPECT_EQ(Tokenizer::Load(directory_.path()).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(TokenizerFiles, MergeByRankThenFromTheLeft) {
  WriteSmallFiles();
  const std::unique_ptr<Tokenizer> tokenizer = LoadOrDie();
  EXPECT_EQ(tokenizer->vocab_size(), 262);
  EXPECT_THAT(tokenizer->Encode("abcab"), ElementsAre(261, 260));
}

TEST_F(TokenizerFiles, TokenizerJsonServesWhenOneOfTheOthersIsMissing) {
  directory_.Write("vocab.json", "not read");
  directory_.Write("tokenizer.json", SmallTokenizer().dump());
  EXPECT_THAT(LoadOrDie()->Encode("abc"), ElementsAre(261));
}

TEST_F(TokenizerFiles, MayHaveWindowsLineEnds) {
  WriteSmallFiles();
  directory_.Write("merges.txt", "#version: 0.2\r\na b\r\nab c\r\n");
  EXPECT_THAT(LoadOrDie()->Encode("abc"), ElementsAre(261));
}

TEST_F(TokenizerFiles, NameTheFirstAndLastTokens) {
  WriteSmallFiles();
  directory_.Write("special_tokens_map.json", R"({"bos_token": {"content": "<pad>"}, "eos_token": "<unk>"})");
  EXPECT_EQ(LoadOrDie()->bos_id(), 1);
  EXPECT_EQ(LoadOrDie()->eos_id(), 3);
  directory_.Write("tokenizer_config.json", R"({"bos_token": "<s>", "eos_token": null})");
  EXPECT_EQ(LoadOrDie()->bos_id(), 0);
  EXPECT_EQ(LoadOrDie()->eos_id(), 3);
}

TEST_F(TokenizerFiles, MakeTokensSpecialAndNoMergeMakesThem) {
  WriteSmallFiles();
  directory_.Write("special_tokens_map.json", R"({"additional_special_tokens": ["abc", {"content": "absent"}]})");
  directory_.Write("tokenizer_config.json",
                   R"({"added_tokens_decoder": {"300": {"content": "<new>", "special": true}}})");
  const std::unique_ptr<Tokenizer> tokenizer = LoadOrDie();
  EXPECT_TRUE(tokenizer->IsSpecial(261));
  EXPECT_TRUE(tokenizer->IsSpecial(300));
  EXPECT_EQ(tokenizer->vocab_size(), 301);
  EXPECT_EQ(tokenizer->Piece(299), "");
  EXPECT_EQ(tokenizer->Bytes(299), "");
  const std::vector<int32_t> ids = tokenizer->Encode("abc");
  EXPECT_EQ(ids.size(), 2u);
  EXPECT_EQ(ids[0], 260);
}

TEST_F(TokenizerFiles, APieceThatIsNotByteLevelStandsForItself) {
  json root = SmallTokenizer();
  root["model"]["vocab"]["世 界"] = 262;
  directory_.Write("tokenizer.json", root.dump());
  EXPECT_EQ(LoadOrDie()->Bytes(262), "世 界");
}

TEST_F(TokenizerFiles, AreRefusedWhenTheyAreNotJson) {
  ExpectVocabRefused("", "is not JSON: error at byte 1");
  ExpectVocabRefused("{\"a\": ", "is not JSON");
  ExpectVocabRefused("{\"a\xFF\": 1}", "is not JSON");
  ExpectVocabRefused("{\"a\": 1e999}", "is not JSON");
  ExpectVocabRefused("{\"a\": 1" + std::string(100000, '0') + ".0}", "is not JSON");
  ExpectVocabRefused("[1, 2]", "is not a JSON object");
  ExpectVocabRefused(std::string(1000, '\0'), "is not JSON");
}

TEST_F(TokenizerFiles, AreRefusedWhenTheyAreNestedTooDeep) {
  ExpectVocabRefused(std::string(20 << 20, '['), "nested deeper than 32");
  std::string nest = R"({"\"[[": )";
  for (int i = 0; i < 100000; ++i) nest += R"({"a":)";
  ExpectVocabRefused(nest, "nested deeper than 32");
  // Brackets in strings are no nesting.
  json vocab = SmallVocab();
  vocab[std::string(50, '[') + "\\\"" + std::string(50, '{')] = 262;
  WriteSmallFiles();
  directory_.Write("vocab.json", vocab.dump());
  EXPECT_EQ(LoadOrDie()->vocab_size(), 263);
}

TEST_F(TokenizerFiles, AreRefusedWhenTheyAreTooLarge) {
  ExpectVocabRefused(std::string((32 << 20) + 1, ' '), "has 33554433 bytes; the limit is 33554432");
}

TEST_F(TokenizerFiles, AreRefusedWhenTheyAreNotRegularFiles) {
  WriteSmallFiles();
  std::filesystem::remove(directory_.path() + "/vocab.json");
  std::filesystem::create_directory(directory_.path() + "/vocab.json");
  ExpectRefused("vocab.json", "is a directory, not a regular file");
  std::filesystem::remove(directory_.path() + "/vocab.json");
  ASSERT_EQ(mkfifo((directory_.path() + "/vocab.json").c_str(), 0600), 0);
  ExpectRefused("vocab.json", "is a FIFO, not a regular file");  // and nobody waits for a writer
}

TEST_F(TokenizerFiles, AreRefusedForIdsThatAreWrong) {
  const auto with = [](const char* piece, const json& id) {
    json vocab = SmallVocab();
    vocab[piece] = id;
    return vocab.dump();
  };
  ExpectVocabRefused(with("x1", -1), R"(the id of "x1" is -1; the limits are 0 and 1048575)");
  ExpectVocabRefused(with("x1", 1 << 20), R"(the id of "x1" is 1048576; the limits are 0 and 1048575)");
  ExpectVocabRefused(with("x1", UINT64_MAX), R"(the id of "x1" is )");
  ExpectVocabRefused(with("x1", 261), R"(id 261 belongs to both "abc" and "x1")");
  ExpectVocabRefused(with("x1", "7"), R"(the id of "x1" is not an integer)");
  ExpectVocabRefused(with("x1", 262.5), R"(the id of "x1" is not an integer)");
  ExpectVocabRefused(with("x1", nullptr), R"(the id of "x1" is not an integer)");
  ExpectVocabRefused(with("x1", json::array({1})), R"(the id of "x1" is not an integer)");
  ExpectVocabRefused(with("", 262), "the token with id 262 is empty");
  ExpectVocabRefused(with(std::string(100000, 'x').c_str(), -1), "...");
}

TEST_F(TokenizerFiles, AreRefusedWhenAByteOrTheEndTokenIsMissing) {
  json vocab = SmallVocab();
  vocab.erase("a");
  ExpectVocabRefused(vocab.dump(), "no token for byte 0x61");
  vocab = SmallVocab();
  vocab.erase("</s>");
  ExpectVocabRefused(vocab.dump(), R"(has no "</s>", the bos_token)");
  ExpectVocabRefused("{}", "no token for byte 0x0");
  directory_.Write("special_tokens_map.json", R"({"pad_token": "!"})");
  ExpectVocabRefused(SmallVocab().dump(), "the token for byte 0x21 is special");
}

TEST_F(TokenizerFiles, AreRefusedForMergesThatAreWrong) {
  ExpectMergesRefused("a b\nno merge at all\n", "line 2: \"no merge at all\" is not two tokens");
  ExpectMergesRefused("a\n", "line 1: \"a\" is not two tokens");
  ExpectMergesRefused("a zz\n", R"(line 1: "zz" is not in the vocabulary)");
  ExpectMergesRefused("a c\n", R"(line 1: "ac" is not in the vocabulary)");
  ExpectMergesRefused(" b\n", R"("" is not in the vocabulary)");
  ExpectMergesRefused("\xFF\xFE \x01\n", R"(line 1: )");
  ExpectMergesRefused(std::string(1 << 20, 'x'), "line 1");
  ExpectMergesRefused(std::string((32 << 20) + 1, '\n'), "the limit is 33554432");
}

TEST_F(TokenizerFiles, AreRefusedForPartsOfTheWrongType) {
  for (const json& wrong : {json(nullptr), json(7), json("text"), json::array({1, "x", nullptr})}) {
    ExpectChangeRefused([&](json& root) { root["model"] = wrong; }, "model is not an object");
    ExpectChangeRefused([&](json& root) { root["model"]["vocab"] = wrong; }, "the vocabulary is not an object");
    ExpectChangeRefused([&](json& root) { root["model"]["merges"] = json::object({{"a", wrong}}); }, "model.merges");
    ExpectChangeRefused([&](json& root) { root["model"]["merges"] = {"a b", wrong}; }, "model.merges[1]: ");
    ExpectChangeRefused([&](json& root) { root["added_tokens"] = {wrong}; }, "added_tokens");
  }
  for (const json& wrong : {json(nullptr), json(7), json::array()}) {
    ExpectChangeRefused(
        [&](json& root) {
          root["added_tokens"] = json::array({{{"id", 262}, {"content", wrong}, {"special", true}}});
        },
        R"(the added token with id 262 has no "content")");
  }
}

TEST_F(TokenizerFiles, AreRefusedForAddedTokensThatAreWrong) {
  const auto with = [](const json& token) {
    return [token](json& root) { root["added_tokens"] = json::array({token}); };
  };
  ExpectChangeRefused(with({{"content", "<x>"}, {"special", true}}), "no integer \"id\"");
  ExpectChangeRefused(with({{"id", -5}, {"content", "<x>"}, {"special", true}}), "is -5; the limits");
  ExpectChangeRefused(with({{"id", 5000000000}, {"content", "<x>"}, {"special", true}}), "is 5000000000; the limits");
  ExpectChangeRefused(with({{"id", 2}, {"content", "<x>"}, {"special", true}}),
                      R"(id 2 belongs to both "</s>" and "<x>")");
  ExpectChangeRefused(with({{"id", 262}, {"content", "</s>"}, {"special", true}}), R"("</s>" has both ids 2 and 262)");
  ExpectChangeRefused(with({{"id", 262}, {"content", "<x>"}, {"special", false}}), R"("<x>" is not special)");
}

TEST_F(TokenizerFiles, AreRefusedForWhatOptDoesNotHave) {
  ExpectChangeRefused([](json& root) { root["model"]["type"] = "Unigram"; }, "model.type is not \"BPE\"");
  ExpectChangeRefused([](json& root) { root["model"]["dropout"] = 0.1; }, "model.dropout is not supported");
  ExpectChangeRefused([](json& root) { root["model"]["byte_fallback"] = true; }, "model.byte_fallback");
  ExpectChangeRefused([](json& root) { root["model"]["end_of_word_suffix"] = "</w>"; }, "model.end_of_word_suffix");
  ExpectChangeRefused([](json& root) { root["normalizer"] = {{"type", "NFC"}}; }, "normalizer");
  ExpectChangeRefused([](json& root) { root["pre_tokenizer"] = nullptr; }, "pre_tokenizer.type");
  ExpectChangeRefused([](json& root) { root["pre_tokenizer"]["type"] = "Whitespace"; }, "pre_tokenizer.type");
  ExpectChangeRefused([](json& root) { root["pre_tokenizer"]["add_prefix_space"] = true; }, "add_prefix_space");
  ExpectChangeRefused([](json& root) { root["pre_tokenizer"]["use_regex"] = false; }, "use_regex");
}

TEST_F(TokenizerFiles, AreRefusedForSpecialTokensThatAreWrong) {
  WriteSmallFiles();
  for (const char* map : {R"({"bos_token": 7})", R"({"bos_token": {"id": 7}})",
                          R"({"additional_special_tokens": [[]]})", "[]", "{", R"({"eos_token": {"content": {}}})"}) {
    directory_.Write("special_tokens_map.json", map);
    ExpectRefused("special_tokens_map.json", "");
  }
  directory_.Write("special_tokens_map.json", R"({"eos_token": "<absent>"})");
  ExpectRefused("vocab.json", R"(has no "<absent>", the eos_token)");
  directory_.Write("special_tokens_map.json", "{}");
  for (const char* config : {R"({"added_tokens_decoder": []})", R"({"added_tokens_decoder": {"x": {}}})",
                             R"({"added_tokens_decoder": {"7": 7}})", R"({"add_prefix_space": true})",
                             R"({"added_tokens_decoder": {"-7": {"content": "<x>", "special": true}}})"}) {
    directory_.Write("tokenizer_config.json", config);
    ExpectRefused("tokenizer_config.json", "");
  }
}

}  // namespace
}  // namespace dejavu
