// A tokenizer's files, in both forms. What is accepted must encode any bytes without loss.
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/text/tokenizer.h"
#include "nlohmann/json.hpp"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

// The 256 tokens of single bytes as members of a vocabulary, which every one needs: @ stands for them in an input.
std::string ByteTokens() {
  nlohmann::json vocab;
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
    const int c = printable ? byte : next++;
    const std::string piece = c < 0x80
                                  ? std::string(1, static_cast<char>(c))
                                  : std::string{static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
    vocab[piece] = byte + 4;
  }
  const std::string members = vocab.dump();
  return members.substr(1, members.size() - 2);
}

void CheckTokenizer(const std::string& directory) {
  const absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(directory);
  CheckAnswer(tokenizer.status(), {absl::StatusCode::kInvalidArgument});
  if (!tokenizer.ok()) return;
  const Tokenizer& t = **tokenizer;
  CHECK(t.vocab_size() >= 256 && t.vocab_size() <= 1 << 20) << t.vocab_size();
  for (const int32_t id : {t.bos_id(), t.eos_id()}) CHECK(id >= 0 && id < t.vocab_size()) << id;
  for (const int32_t id : {-1, t.vocab_size()}) CHECK(t.Bytes(id).empty() && t.Piece(id).empty()) << id;
  for (const absl::string_view text :
       {"the theme of a cat, a  hat </s>", "\xff\xfe \xE2\x80\x9C\xE2\x80", "aaaaaaab"}) {
    std::string bytes;
    for (const int32_t id : t.Encode(text)) {
      CHECK(id >= 0 && id < t.vocab_size() && !t.IsSpecial(id)) << id;
      bytes.append(t.Bytes(id).data(), t.Bytes(id).size());
    }
    CHECK(bytes == text) << "other bytes come back: " << bytes;
  }
}

std::string Expanded(absl::string_view text) {
  static const std::string& tokens = *new std::string(ByteTokens());
  // Once: a hundred vocabularies in one file are no more of a test than one.
  const size_t at = text.find('@');
  if (at == absl::string_view::npos) return std::string(text);
  return absl::StrCat(text.substr(0, at), tokens, text.substr(at + 1));
}

// An empty section is no file.
void WriteMore(const FuzzFiles& files, FuzzInput* input) {
  for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
    const absl::string_view section = input->Section();
    if (section.empty()) {
      files.Remove(name);
    } else {
      files.Write(name, section);
    }
  }
}

void RunTokenizerJson(absl::string_view bytes) {
  static const FuzzFiles& files = *new FuzzFiles;
  FuzzInput input(bytes);
  files.Write("tokenizer.json", Expanded(input.Section()));
  WriteMore(files, &input);
  CheckTokenizer(files.path());
}

void RunVocabMerges(absl::string_view bytes) {
  static const FuzzFiles& files = *new FuzzFiles;
  FuzzInput input(bytes);
  files.Write("vocab.json", Expanded(input.Section()));
  files.Write("merges.txt", input.Section());
  WriteMore(files, &input);
  CheckTokenizer(files.path());
}

constexpr char kMore[] =
    "\x1e"
    R"({"add_prefix_space":false,"bos_token":"</s>","added_tokens_decoder":{"1":{"content":"<pad>","special":true}}})"
    "\x1e"
    R"({"eos_token":{"content":"</s>"},"additional_special_tokens":["<mask>"]})";

std::vector<std::string> Words() {
  return {"@",
          "\"</s>\"",
          "\"<pad>\"",
          "\"content\":",
          "\"special\":true",
          "\"added_tokens\":",
          "\"merges\":",
          "\"vocab\":",
          "\"id\":",
          "[\"a\",\"b\"]",
          "\"a b\"",
          "1048575",
          "1048576",
          "-1",
          "18446744073709551615",
          "\\u0120",
          "null",
          "true",
          "\xC4\xA0",
          "\n",
          " ",
          "#version",
          "\x1e",
          "\"model\":{",
          "\"pre_tokenizer\":",
          "\"ByteLevel\""};
}

}  // namespace

FuzzTarget TokenizerJsonTarget() {
  const std::string vocab =
      R"("vocab":{"<s>":0,"<pad>":1,"</s>":2,"<unk>":3,@,"th":260,"the":261,"\u0120the":262,"aa":263})";
  const std::string merges = R"("merges":["t h",["th","e"],"\u0120 the","a a"])";
  const std::string file =
      absl::StrCat(R"({"added_tokens":[{"id":2,"content":"</s>","special":true}],"normalizer":null,)",
                   R"("pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"use_regex":true},)",
                   R"("model":{"type":"BPE","dropout":null,)", vocab, ",", merges, "}}");
  return {"tokenizer_json",
          4096,
          RunTokenizerJson,
          {file, file + kMore, absl::StrCat(R"({"model":{)", vocab, R"(,"merges":[]}})"),
           R"({"model":{"vocab":{"</s>":0,@,"ab":300,"abc":1000},"merges":["a b","ab c"]}})"},
          Words()};
}

FuzzTarget VocabMergesTarget() {
  const std::string vocab = R"({"<s>":0,"<pad>":1,"</s>":2,"<unk>":3,@,"th":260,"the":261,"\u0120the":262,"aa":263})";
  const std::string merges = "\x1e#version: 0.2\nt h\nth e\r\n\xC4\xA0 the\na a\n";
  return {"vocab_merges",
          4096,
          RunVocabMerges,
          {vocab + merges, vocab + merges + kMore, vocab + "\x1e",
           R"({"</s>":0,@,"ab":300})"
           "\x1e"
           "a b"},
          Words()};
}

}  // namespace dejavu
