// A tokenizer's files, in both forms. What is accepted must encode any bytes without loss, but for the spaces that
// added tokens take.
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
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

// Spaces beside an added token may be its own, and one may come before a text.
std::string WithoutSpaces(absl::string_view text) {
  return absl::StrReplaceAll(text, {{" ", ""}, {"\t", ""}, {"\n", ""}, {"\v", ""}, {"\f", ""}, {"\r", ""}});
}

// An added token is looked for as it is written, others stand for bytes.
void CheckTokenizer(const std::string& directory) {
  const absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(directory);
  CheckAnswer(tokenizer.status(), {absl::StatusCode::kInvalidArgument});
  if (!tokenizer.ok()) return;
  const Tokenizer& t = **tokenizer;
  CHECK(t.vocab_size() >= 256 && t.vocab_size() <= 1 << 20) << t.vocab_size();
  for (const int32_t id : t.unused_ids()) CHECK(id >= 0 && id < t.vocab_size() && t.Piece(id).empty()) << id;
  for (const int32_t id : {-1, t.vocab_size()}) CHECK(t.Bytes(id).empty() && t.Piece(id).empty()) << id;
  for (const absl::string_view text :
       {"the theme of a cat, a  hat </s>", "\xff\xfe \xE2\x80\x9C\xE2\x80", "aaaaaaab"}) {
    for (const bool parse_special : {false, true}) {
      std::string rest = WithoutSpaces(text);
      for (const int32_t id : t.Encode(text, parse_special)) {
        CHECK(id >= 0 && id < t.vocab_size() && !t.Piece(id).empty()) << id;
        const std::string bytes = WithoutSpaces(t.Bytes(id)), piece = WithoutSpaces(t.Piece(id));
        const bool as_bytes = absl::StartsWith(rest, bytes);
        CHECK(as_bytes || absl::StartsWith(rest, piece)) << "token " << id << " is not in the text at: " << rest;
        rest.erase(0, as_bytes ? bytes.size() : piece.size());
      }
      CHECK(rest.empty()) << "not encoded: " << rest;
    }
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
  for (const char* name : {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}) {
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
// Each kind of added token, in a generic tokenizer.
constexpr char kAdded[] =
    "\x1e"
    R"({"tokenizer_class":"PreTrainedTokenizerFast","mask_token":"the","additional_special_tokens":["a "],)"
    R"("added_tokens_decoder":{"264":{"content":"hat","single_word":true,"lstrip":true,"special":true},)"
    R"("265":{"content":" ","rstrip":true,"normalized":false}}})"
    "\x1e\x1e"
    R"({"cat":264})";

std::vector<std::string> Words() {
  return {"@",
          "\"</s>\"",
          "\"<pad>\"",
          "\"content\":",
          "\"special\":true",
          "\"special\":false",
          "\"lstrip\":true",
          "\"rstrip\":true",
          "\"single_word\":true",
          "\"normalized\":true",
          "\"add_prefix_space\":true",
          "\"use_regex\":false",
          "\"ignore_merges\":true",
          "\"tokenizer_class\":\"PreTrainedTokenizerFast\"",
          "\"post_processor\":",
          "\"TemplateProcessing\"",
          "\"RobertaProcessing\"",
          "\"Sequence\"",
          "\"single\":",
          "\"mask_token\":",
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
  const std::string generic = absl::StrCat(
      R"({"added_tokens":[{"id":2,"content":"</s>","single_word":false,"lstrip":false,"rstrip":true,"normalized":true,)",
      R"("special":true}],"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"ByteLevel","add_prefix_space":true,)",
      R"("trim_offsets":true,"use_regex":false}]},"decoder":{"type":"ByteLevel"},"post_processor":{"type":"Sequence",)",
      R"("processors":[{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"</s>"}},{"Sequence":{"id":"A"}}],)",
      R"("special_tokens":{"</s>":{"ids":[2]}}}]},"model":{"type":"BPE","ignore_merges":true,)", vocab, ",", merges,
      "}}");
  return {"tokenizer_json",
          4096,
          RunTokenizerJson,
          {file, file + kMore, generic + kAdded, absl::StrCat(R"({"model":{)", vocab, R"(,"merges":[]}})"),
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
