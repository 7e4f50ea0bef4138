// A token is written with one printable character per byte (GPT-2's table): printable Latin-1 stands for itself, the
// other 68 bytes for U+0100 and up, in order. Tokens with other characters stand for their own UTF-8, as in Hugging
// Face.
#include "engine/text/tokenizer_files.h"

#include <filesystem>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "kernels/base/regular_file.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

using nlohmann::json;

constexpr int64_t kMaxFileBytes = 32 << 20;
constexpr int kMaxJsonDepth = 32;  // the deepest real file has 6
constexpr int64_t kMaxTokens = 1 << 20;

constexpr const char* kSpecialTokens[] = {"<s>", "<pad>", "</s>", "<unk>"};
constexpr const char* kSpecialKeys[] = {"bos_token", "eos_token", "unk_token",  "sep_token",
                                        "pad_token", "cls_token", "mask_token", "additional_special_tokens"};

absl::Status Malformed(const std::string& file, absl::string_view reason) {
  return absl::InvalidArgumentError(absl::StrCat(file, ": ", reason));
}

// A text from a file, fit for a message: UTF-8 as it is, other bytes by their numbers.
std::string Quoted(absl::string_view text) {
  constexpr size_t kMaxBytes = 80;
  const absl::string_view start = text.substr(0, kMaxBytes), whole = start.substr(0, ValidUtf8Prefix(start));
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(whole), absl::CHexEscape(start.substr(whole.size())),
                      text.size() > kMaxBytes ? "..." : "", "\"");
}

bool Exists(const std::string& file) {
  std::error_code error;
  return std::filesystem::exists(file, error);
}

bool NestsTooDeep(absl::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string && c == '\\') {
      ++i;
    } else if (c == '"') {
      in_string = !in_string;
    } else if (!in_string && (c == '{' || c == '[')) {
      if (++depth > kMaxJsonDepth) return true;
    } else if (!in_string && (c == '}' || c == ']')) {
      --depth;
    }
  }
  return false;
}

// The file's top-level object.
absl::StatusOr<json> ReadJson(const std::string& file) {
  ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(file, kMaxFileBytes));
  // Before parsing: a nest of 32 million arrays takes gigabytes.
  if (NestsTooDeep(text)) return Malformed(file, absl::StrCat("JSON is nested deeper than ", kMaxJsonDepth, " levels"));
  try {
    json value = json::parse(text);
    if (!value.is_object()) return Malformed(file, "is not a JSON object");
    return value;
  } catch (const json::parse_error& error) {
    return Malformed(file, absl::StrCat("is not JSON: error at byte ", error.byte));
  } catch (const json::exception& error) {
    return Malformed(file, absl::StrCat("is not JSON: ", Quoted(error.what())));
  }
}

// `object[key]`, or null where there is no such key.
const json& Get(const json& object, const char* key) {
  static const json null;
  const auto entry = object.find(key);
  return entry == object.end() ? null : *entry;
}

std::string ByteSymbol(int byte) {
  static const auto& symbols = *[] {
    auto* table = new std::array<std::string, 256>;
    int next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
      const int c = printable ? b : next++;
      (*table)[b] = c < 0x80 ? std::string(1, static_cast<char>(c))
                             : std::string{static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
    }
    return table;
  }();
  return symbols[byte];
}

std::string BytesOfPiece(absl::string_view piece) {
  static const auto& bytes_of_symbols = *[] {
    auto* table = new absl::flat_hash_map<std::string, char>;
    for (int b = 0; b < 256; ++b) table->emplace(ByteSymbol(b), static_cast<char>(b));
    return table;
  }();
  std::string bytes;
  for (absl::string_view rest = piece; !rest.empty();) {
    const absl::string_view symbol = rest.substr(0, FirstUtf8Step(rest).length);
    const auto byte = bytes_of_symbols.find(symbol);
    if (byte == bytes_of_symbols.end()) return std::string(piece);
    bytes.push_back(byte->second);
    rest.remove_prefix(symbol.size());
  }
  return bytes;
}

class Reader {
 public:
  explicit Reader(const std::string& directory) : directory_(directory) {}
  absl::StatusOr<TokenizerData> Read();

 private:
  std::string Path(const char* name) const { return absl::StrCat(directory_, "/", name); }

  absl::Status ReadVocabAndMerges();
  absl::Status ReadTokenizerJson();
  absl::Status ReadTokenizerConfig();
  absl::Status ReadSpecialTokensMap();

  absl::Status AddVocab(const std::string& file, const json& vocab);
  absl::Status AddToken(const std::string& file, const std::string& piece, int64_t id);
  absl::Status AddAddedToken(const std::string& file, const json& token, int64_t id);
  absl::Status MarkSpecialTokens(const std::string& file, const json& config);
  absl::Status MarkSpecialToken(const std::string& file, const char* key, const json& value);
  void MarkSpecial(absl::string_view piece);
  absl::Status FindByteTokens();
  absl::StatusOr<int32_t> FindSpecial(const char* role, const std::string& piece) const;
  absl::Status AddMerge(absl::string_view left, absl::string_view right);
  absl::Status AddMergeLine(absl::string_view line);
  absl::Status AddMergeEntry(const json& entry);

  const std::string directory_;
  TokenizerData data_;
  absl::flat_hash_map<std::string, int32_t> ids_;
  std::string vocab_file_, merges_file_;
  std::string bos_, eos_;  // empty until a file names them
};

absl::StatusOr<TokenizerData> Reader::Read() {
  const bool two_files = Exists(Path("vocab.json")) && Exists(Path("merges.txt"));
  if (!two_files && !Exists(Path("tokenizer.json"))) {
    return absl::NotFoundError(
        absl::StrCat(directory_, " holds no tokenizer: neither vocab.json and merges.txt nor tokenizer.json"));
  }
  RETURN_IF_ERROR(two_files ? ReadVocabAndMerges() : ReadTokenizerJson());
  ASSIGN_OR_RETURN(data_.bos_id, FindSpecial("bos_token", bos_.empty() ? "</s>" : bos_));
  ASSIGN_OR_RETURN(data_.eos_id, FindSpecial("eos_token", eos_.empty() ? "</s>" : eos_));
  for (TokenizerData::Token& token : data_.tokens) token.bytes = BytesOfPiece(token.piece);
  return std::move(data_);
}

// Special tokens come before merges in both forms, because no merge may make one.
absl::Status Reader::ReadVocabAndMerges() {
  vocab_file_ = Path("vocab.json");
  merges_file_ = Path("merges.txt");
  ASSIGN_OR_RETURN(const json vocab, ReadJson(vocab_file_));
  RETURN_IF_ERROR(AddVocab(vocab_file_, vocab));
  RETURN_IF_ERROR(ReadTokenizerConfig());
  RETURN_IF_ERROR(ReadSpecialTokensMap());
  RETURN_IF_ERROR(FindByteTokens());
  ASSIGN_OR_RETURN(const std::string merges, ReadRegularFile(merges_file_, kMaxFileBytes));
  int line_number = 0;
  for (absl::string_view line : absl::StrSplit(merges, '\n')) {
    ++line_number;
    if (absl::EndsWith(line, "\r")) line.remove_suffix(1);
    if (line.empty() || absl::StartsWith(line, "#version")) continue;
    const absl::Status status = AddMergeLine(line);
    if (!status.ok()) return Malformed(merges_file_, absl::StrCat("line ", line_number, ": ", status.message()));
  }
  return absl::OkStatus();
}

// What Hugging Face can put into a tokenizer.json and OPT's does not have.
absl::Status CheckIsByteLevelBpe(const std::string& file, const json& root, const json& model) {
  const json& type = Get(model, "type");
  if (!type.is_null() && type != "BPE") return Malformed(file, "model.type is not \"BPE\"");
  const auto is_off = [](const json& value) {
    return value.is_null() || value == false || value == 0 ||
           (value.is_string() && value.get_ref<const std::string&>().empty());
  };
  for (const char* key :
       {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"}) {
    if (!is_off(Get(model, key))) return Malformed(file, absl::StrCat("model.", key, " is not supported"));
  }
  if (!Get(root, "normalizer").is_null()) return Malformed(file, "normalizer is not supported");
  if (!root.contains("pre_tokenizer")) return absl::OkStatus();
  const json& split = root["pre_tokenizer"];
  if (!split.is_object() || Get(split, "type") != "ByteLevel") {
    return Malformed(file, "pre_tokenizer.type is not \"ByteLevel\"");
  }
  if (!is_off(Get(split, "add_prefix_space"))) {
    return Malformed(file, "pre_tokenizer.add_prefix_space is not supported");
  }
  if (Get(split, "use_regex") == false) return Malformed(file, "pre_tokenizer.use_regex = false is not supported");
  return absl::OkStatus();
}

absl::Status Reader::ReadTokenizerJson() {
  vocab_file_ = merges_file_ = Path("tokenizer.json");
  ASSIGN_OR_RETURN(const json root, ReadJson(vocab_file_));
  const json& model = Get(root, "model");
  if (!model.is_object()) return Malformed(vocab_file_, "model is not an object");
  RETURN_IF_ERROR(CheckIsByteLevelBpe(vocab_file_, root, model));
  RETURN_IF_ERROR(AddVocab(vocab_file_, Get(model, "vocab")));

  const json& added = Get(root, "added_tokens");
  if (!added.is_null() && !added.is_array()) return Malformed(vocab_file_, "added_tokens is not an array");
  for (const json& token : added) {
    if (!token.is_object() || !Get(token, "id").is_number_integer()) {
      return Malformed(vocab_file_, "an entry of added_tokens has no integer \"id\"");
    }
    RETURN_IF_ERROR(AddAddedToken(vocab_file_, token, token["id"].get<int64_t>()));
  }
  RETURN_IF_ERROR(ReadTokenizerConfig());
  RETURN_IF_ERROR(ReadSpecialTokensMap());
  RETURN_IF_ERROR(FindByteTokens());

  const json& merges = Get(model, "merges");
  if (!merges.is_array()) return Malformed(merges_file_, "model.merges is not an array");
  for (size_t i = 0; i < merges.size(); ++i) {
    const absl::Status status = AddMergeEntry(merges[i]);
    if (!status.ok()) return Malformed(merges_file_, absl::StrCat("model.merges[", i, "]: ", status.message()));
  }
  return absl::OkStatus();
}

absl::Status Reader::ReadTokenizerConfig() {
  const std::string file = Path("tokenizer_config.json");
  if (!Exists(file)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const json config, ReadJson(file));
  if (Get(config, "add_prefix_space") == true) return Malformed(file, "add_prefix_space is not supported");
  const json& added = Get(config, "added_tokens_decoder");
  if (!added.is_null() && !added.is_object()) return Malformed(file, "added_tokens_decoder is not an object");
  for (const auto& [key, token] : added.items()) {
    int64_t id;
    if (!absl::SimpleAtoi(key, &id) || !token.is_object()) {
      return Malformed(file, absl::StrCat("added_tokens_decoder[", Quoted(key), "] is not a token under its id"));
    }
    RETURN_IF_ERROR(AddAddedToken(file, token, id));
  }
  return MarkSpecialTokens(file, config);
}

absl::Status Reader::ReadSpecialTokensMap() {
  const std::string file = Path("special_tokens_map.json");
  if (!Exists(file)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const json map, ReadJson(file));
  return MarkSpecialTokens(file, map);
}

absl::Status Reader::AddVocab(const std::string& file, const json& vocab) {
  if (!vocab.is_object()) return Malformed(file, "the vocabulary is not an object");
  for (const auto& [piece, id] : vocab.items()) {
    if (!id.is_number_integer())
      return Malformed(file, absl::StrCat("the id of ", Quoted(piece), " is not an integer"));
    RETURN_IF_ERROR(AddToken(file, piece, id.get<int64_t>()));
  }
  for (const char* piece : kSpecialTokens) MarkSpecial(piece);
  return absl::OkStatus();
}

absl::Status Reader::AddToken(const std::string& file, const std::string& piece, int64_t id) {
  if (piece.empty()) return Malformed(file, absl::StrCat("the token with id ", id, " is empty"));
  if (id < 0 || id >= kMaxTokens) {
    return Malformed(file,
                     absl::StrCat("the id of ", Quoted(piece), " is ", id, "; the limits are 0 and ", kMaxTokens - 1));
  }
  if (static_cast<size_t>(id) >= data_.tokens.size()) data_.tokens.resize(id + 1);
  std::string& holder = data_.tokens[id].piece;
  if (!holder.empty() && holder != piece) {
    return Malformed(file, absl::StrCat("id ", id, " belongs to both ", Quoted(holder), " and ", Quoted(piece)));
  }
  const int32_t known_id = ids_.try_emplace(piece, id).first->second;
  if (known_id != id) return Malformed(file, absl::StrCat(Quoted(piece), " has both ids ", known_id, " and ", id));
  holder = piece;
  return absl::OkStatus();
}

absl::Status Reader::AddAddedToken(const std::string& file, const json& token, int64_t id) {
  const json& content = Get(token, "content");
  if (!content.is_string()) return Malformed(file, absl::StrCat("the added token with id ", id, " has no \"content\""));
  const std::string& piece = content.get_ref<const std::string&>();
  // Hugging Face would find it in the text before splitting; OPT has none.
  if (Get(token, "special") != true) {
    return Malformed(file, absl::StrCat("added token ", Quoted(piece), " is not special, which is not supported"));
  }
  RETURN_IF_ERROR(AddToken(file, piece, id));
  MarkSpecial(piece);
  return absl::OkStatus();
}

absl::Status Reader::MarkSpecialTokens(const std::string& file, const json& config) {
  for (const char* key : kSpecialKeys) {
    const json& value = Get(config, key);
    if (value.is_null()) continue;
    if (!value.is_array()) {
      RETURN_IF_ERROR(MarkSpecialToken(file, key, value));
      continue;
    }
    for (const json& element : value) RETURN_IF_ERROR(MarkSpecialToken(file, key, element));
  }
  return absl::OkStatus();
}

// `value`: "</s>" or {"content": "</s>", ...}. The file that is read first decides bos and eos.
absl::Status Reader::MarkSpecialToken(const std::string& file, const char* key, const json& value) {
  const json& content = value.is_object() ? Get(value, "content") : value;
  if (!content.is_string()) return Malformed(file, absl::StrCat(key, " does not name a token"));
  const std::string& piece = content.get_ref<const std::string&>();
  MarkSpecial(piece);
  if (absl::string_view(key) == "bos_token" && bos_.empty()) bos_ = piece;
  if (absl::string_view(key) == "eos_token" && eos_.empty()) eos_ = piece;
  return absl::OkStatus();
}

// Names that the vocabulary lacks (a "<mask>" that the model never had) are of no concern.
void Reader::MarkSpecial(absl::string_view piece) {
  const auto id = ids_.find(piece);
  if (id != ids_.end()) data_.tokens[id->second].special = true;
}

absl::Status Reader::FindByteTokens() {
  for (int byte = 0; byte < 256; ++byte) {
    const auto id = ids_.find(ByteSymbol(byte));
    if (id == ids_.end()) return Malformed(vocab_file_, absl::StrCat("no token for byte 0x", absl::Hex(byte)));
    if (data_.tokens[id->second].special) {
      return Malformed(vocab_file_, absl::StrCat("the token for byte 0x", absl::Hex(byte), " is special"));
    }
    data_.byte_ids[byte] = id->second;
  }
  return absl::OkStatus();
}

absl::StatusOr<int32_t> Reader::FindSpecial(const char* role, const std::string& piece) const {
  const auto id = ids_.find(piece);
  if (id == ids_.end()) return Malformed(vocab_file_, absl::StrCat("has no ", Quoted(piece), ", the ", role));
  return id->second;
}

absl::Status Reader::AddMerge(absl::string_view left, absl::string_view right) {
  const std::string result = absl::StrCat(left, right);
  int32_t merge[3];
  int32_t* slot = merge;
  for (const absl::string_view piece : {left, right, absl::string_view(result)}) {
    const auto id = ids_.find(piece);
    if (id == ids_.end()) return absl::InvalidArgumentError(absl::StrCat(Quoted(piece), " is not in the vocabulary"));
    *slot++ = id->second;
  }
  // Special tokens written out in a text are ordinary text.
  if (!data_.tokens[merge[2]].special) data_.merges.push_back({merge[0], merge[1], merge[2]});
  return absl::OkStatus();
}

absl::Status Reader::AddMergeLine(absl::string_view line) {
  const size_t space = line.find(' ');
  if (space == absl::string_view::npos || line.find(' ', space + 1) != absl::string_view::npos) {
    return absl::InvalidArgumentError(absl::StrCat(Quoted(line), " is not two tokens with a space between them"));
  }
  return AddMerge(line.substr(0, space), line.substr(space + 1));
}

absl::Status Reader::AddMergeEntry(const json& entry) {
  if (entry.is_string()) return AddMergeLine(entry.get_ref<const std::string&>());
  if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() || !entry[1].is_string()) {
    return absl::InvalidArgumentError("is neither \"a b\" nor [\"a\", \"b\"]");
  }
  return AddMerge(entry[0].get_ref<const std::string&>(), entry[1].get_ref<const std::string&>());
}

}  // namespace

absl::StatusOr<TokenizerData> ReadTokenizerFiles(const std::string& directory) { return Reader(directory).Read(); }

}  // namespace dejavu
