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
  const json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  return {{"model", {{"type", "BPE"}, {"vocab", SmallVocab()}, {"merges", {"a b", "ab c"}}}},
          {"added_tokens", json::array()},
          {"pre_tokenizer", byte_level},
          {"decoder", byte_level}};
}

// With all its flags, as tokenizer.json has them.
json Added(int64_t id, const char* content, bool special) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", special}};
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
  // A tokenizer.json that is obeyed in all it says.
  void WriteGeneric() {
    directory_.Write("tokenizer_config.json", R"({"tokenizer_class": "PreTrainedTokenizerFast"})");
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
  ExpectRefused("vocab.json", "there is no merges.txt beside it");
}

TEST_F(TokenizerFiles, MergeByRankThenFromTheLeft) {
  WriteSmallFiles();
  const std::unique_ptr<Tokenizer> tokenizer = LoadOrDie();
  EXPECT_EQ(tokenizer->vocab_size(), 263);  // with <|endoftext|>, where no file names an end token
  EXPECT_THAT(tokenizer->Encode("abcab"), ElementsAre(261, 260));
}

TEST_F(TokenizerFiles, AreNotReadBesideATokenizerJson) {
  directory_.Write("vocab.json", "not read");
  directory_.Write("merges.txt", "nor this");
  directory_.Write("tokenizer.json", SmallTokenizer().dump());
  EXPECT_THAT(LoadOrDie()->Encode("abc"), ElementsAre(261));
}

TEST_F(TokenizerFiles, MayHaveWindowsLineEnds) {
  WriteSmallFiles();
  directory_.Write("merges.txt", "#version: 0.2\r\na b\r\nab c\r\n");
  EXPECT_THAT(LoadOrDie()->Encode("abc"), ElementsAre(261));
}

TEST_F(TokenizerFiles, SayWhatStandsAroundAPrompt) {
  WriteSmallFiles();
  EXPECT_THAT(LoadOrDie()->EncodePrompt("ab"), ElementsAre(260));
  directory_.Write("tokenizer_config.json", R"({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true})");
  EXPECT_THAT(LoadOrDie()->EncodePrompt("ab"), ElementsAre(0, 260));
  EXPECT_THAT(LoadOrDie()->EncodePrompt(""), ElementsAre(0));
  directory_.Write("special_tokens_map.json", R"({"bos_token": {"content": "<pad>"}})");
  EXPECT_THAT(LoadOrDie()->EncodePrompt("ab"), ElementsAre(1, 260));
  directory_.Write("tokenizer_config.json", R"({"eos_token": "</s>", "add_bos_token": false, "add_eos_token": true})");
  EXPECT_THAT(LoadOrDie()->EncodePrompt("ab"), ElementsAre(260, 2));
}

TEST_F(TokenizerFiles, AddTokensThatAreFoundInTexts) {
  WriteSmallFiles();
  directory_.Write("tokenizer_config.json", R"({"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>",
      "added_tokens_decoder": {"262": {"content": "<new>", "special": true},
                               "263": {"content": "cab", "special": false, "rstrip": true}}})");
  const std::unique_ptr<Tokenizer> tokenizer = LoadOrDie();
  EXPECT_EQ(tokenizer->vocab_size(), 264);
  EXPECT_TRUE(tokenizer->IsSpecial(262));
  EXPECT_FALSE(tokenizer->IsSpecial(263));
  EXPECT_THAT(tokenizer->Encode("abcab  <new>", true), ElementsAre(260, 263, 262));
  EXPECT_EQ(tokenizer->Encode("<new>").size(), 5u);
  EXPECT_EQ(tokenizer->Decode({260, 262, 263}, true), "abcab");
  EXPECT_EQ(tokenizer->Decode({260, 262, 263}, false), "ab<new>cab");
  EXPECT_EQ(tokenizer->SpecialId("<new>"), 262);
  EXPECT_EQ(tokenizer->SpecialId("cab"), -1);
}

TEST_F(TokenizerFiles, MayMakeAnyTokenSpecial) {
  WriteSmallFiles();
  directory_.Write("tokenizer_config.json", R"({"pad_token": "abc", "mask_token": "!"})");
  const std::unique_ptr<Tokenizer> tokenizer = LoadOrDie();
  EXPECT_TRUE(tokenizer->IsSpecial(261));
  EXPECT_THAT(tokenizer->Encode("abc"), ElementsAre(261));  // by its merges, as ever
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode("abc!a"), true), "a");
}

TEST_F(TokenizerFiles, TellWhichIdsNoTokenHas) {
  json vocab = SmallVocab();
  vocab["abcabc"] = 267;
  WriteSmallFiles();
  directory_.Write("vocab.json", vocab.dump());
  directory_.Write("tokenizer_config.json", R"({"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"})");
  EXPECT_THAT(LoadOrDie()->unused_ids(), ElementsAre(262, 263, 264, 265, 266));
}

// As Transformers does, whatever the file says, but not in silence.
TEST_F(TokenizerFiles, GiveAddedTokensTheNextIds) {
  WriteSmallFiles();
  directory_.Write("added_tokens.json", R"({"<one>": 262, "<two>": 263})");
  EXPECT_THAT(LoadOrDie()->Encode("<two><one>"), ElementsAre(263, 262));
  EXPECT_TRUE(LoadOrDie()->remarks().empty());
  directory_.Write("added_tokens.json", R"({"<one>": 262, "<two>": 300})");
  EXPECT_THAT(LoadOrDie()->Encode("<two><one>"), ElementsAre(263, 262));
  EXPECT_THAT(LoadOrDie()->remarks(),
              ElementsAre(HasSubstr(R"(the id of the added token "<two>" is 300, but Transformers gives it 263)")));
}

TEST_F(TokenizerFiles, ForAnotherClassAreRefused) {
  WriteSmallFiles();
  directory_.Write("tokenizer_config.json", R"({"tokenizer_class": "RobertaTokenizerFast"})");
  ExpectRefused("tokenizer_config.json", R"(tokenizer_class is "RobertaTokenizerFast")");
  directory_.Write("tokenizer_config.json", "{}");
  directory_.Write("config.json", R"({"tokenizer_class": "LlamaTokenizer", "init_std": 0.02})");
  ExpectRefused("config.json", R"(tokenizer_class is "LlamaTokenizer")");
  directory_.Write("config.json", R"({"init_std": NaN})");  // which is for others to judge
  EXPECT_THAT(LoadOrDie()->Encode("abc"), ElementsAre(261));
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
  EXPECT_EQ(LoadOrDie()->vocab_size(), 264);
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

TEST_F(TokenizerFiles, AreRefusedWhenAByteIsMissing) {
  json vocab = SmallVocab();
  vocab.erase("a");
  ExpectVocabRefused(vocab.dump(), "no token for byte 0x61");
  ExpectVocabRefused("{}", "no token for byte 0x0");
}

TEST_F(TokenizerFiles, AreRefusedForMergesThatAreWrong) {
  ExpectMergesRefused("a b\nno merge at all\n", "line 2: \"no merge at all\" is not two tokens");
  ExpectMergesRefused("a\n", "line 1: \"a\" is not two tokens");
  ExpectMergesRefused("a zz\n", R"(line 1: "zz" is not in the vocabulary)");
  ExpectMergesRefused("a c\n", R"(line 1: "ac" is not in the vocabulary)");
  ExpectMergesRefused(" b\n", R"("" is not in the vocabulary)");
  ExpectMergesRefused("a b\n\nab c\n", R"(line 2: "" is not two tokens)");
  ExpectMergesRefused("\xFF\xFE \x01\n", R"(line 1: )");
  ExpectMergesRefused("\xEF\xBB\xBF#version: 0.2\na b\n", "begins with a byte order mark");
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
  ExpectChangeRefused(with(Added(-5, "<x>", true)), R"(the id of "<x>" is -5; the limits are 0 and 1048575)");
  ExpectChangeRefused(with(Added(5000000000, "<x>", true)), R"("<x>" is 5000000000; the limits)");
  json token = Added(262, "<x>", true);
  token["lstrip"] = 1;
  ExpectChangeRefused(with(token), R"(token "<x>" has "lstrip": "1", which is no flag of a token)");
  ExpectChangeRefused(with(Added(262, std::string(1 << 20, 'x').append("x").c_str(), true)),
                      "the added tokens have more than 1048576 bytes");
}

TEST_F(TokenizerFiles, AreRefusedForWhatByteLevelBpeDoesNotHave) {
  ExpectChangeRefused([](json& root) { root["model"]["type"] = "Unigram"; }, "model.type is not \"BPE\"");
  ExpectChangeRefused([](json& root) { root["post_processor"] = {{"type", "Other"}}; }, "post_processor \"Other\"");
  WriteGeneric();
  ExpectChangeRefused([](json& root) { root["model"]["dropout"] = 0.1; }, "model.dropout is not supported");
  ExpectChangeRefused([](json& root) { root["model"]["end_of_word_suffix"] = "</w>"; }, "model.end_of_word_suffix");
  ExpectChangeRefused([](json& root) { root["model"].erase("merges"); }, "model.merges is not an array");
  ExpectChangeRefused([](json& root) { root["normalizer"] = {{"type", "NFC"}}; }, "normalizer \"NFC\"");
  ExpectChangeRefused([](json& root) { root["pre_tokenizer"] = nullptr; }, "pre_tokenizer.type");
  ExpectChangeRefused([](json& root) { root["pre_tokenizer"]["type"] = "Whitespace"; }, "pre_tokenizer.type");
  ExpectChangeRefused([](json& root) { root["decoder"]["type"] = "WordPiece"; }, "decoder.type");
}

TEST_F(TokenizerFiles, AreRefusedForSpecialTokensThatAreWrong) {
  WriteSmallFiles();
  for (const char* map : {R"({"bos_token": 7})", R"({"bos_token": {"id": 7}})",
                          R"({"additional_special_tokens": [[]]})", "[]", "{", R"({"eos_token": {"content": {}}})"}) {
    directory_.Write("special_tokens_map.json", map);
    ExpectRefused("special_tokens_map.json", "");
  }
  directory_.Write("special_tokens_map.json", "{}");
  for (const char* config :
       {R"({"added_tokens_decoder": []})", R"({"added_tokens_decoder": {"x": {}}})",
        R"({"added_tokens_decoder": {"7": 7}})", R"({"add_prefix_space": "yes"})",
        R"({"bos_token": {"content": "</s>"}})", R"({"auto_map": {"AutoTokenizer": ["a.B", null]}})",
        R"({"bos_token": "a b", "add_bos_token": true})", R"({"extra_special_tokens": {"x_token": "x"}})",
        R"({"added_tokens_decoder": {"-7": {"content": "<x>", "special": true}}})"}) {
    directory_.Write("tokenizer_config.json", config);
    ExpectRefused("tokenizer_config.json", "");
  }
}

}  // namespace
}  // namespace dejavu
