// A token is written with one printable character per byte (GPT-2's table): printable Latin-1 stands for itself, the
// other 68 bytes for U+0100 and up, in order. Tokens with other characters stand for their own UTF-8, as in Hugging
// Face.
#include "engine/text/tokenizer_files.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "engine/text/json_file.h"
#include "engine/text/tokenizer_json.h"
#include "engine/text/tokenizer_settings.h"
#include "kernels/base/regular_file.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"

namespace dejavu {
namespace {

using nlohmann::json;

constexpr size_t kMaxAddedBytes = 1 << 20;  // of all added tokens together: a search over them keeps a node for each

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

// False for a piece with other characters, which stands for itself.
bool BytesOfPiece(absl::string_view piece, std::string* bytes) {
  static const auto& bytes_of_symbols = *[] {
    auto* table = new absl::flat_hash_map<std::string, char>;
    for (int b = 0; b < 256; ++b) table->emplace(ByteSymbol(b), static_cast<char>(b));
    return table;
  }();
  bytes->clear();
  for (absl::string_view rest = piece; !rest.empty();) {
    const absl::string_view symbol = rest.substr(0, FirstUtf8Step(rest).length);
    const auto byte = bytes_of_symbols.find(symbol);
    if (byte == bytes_of_symbols.end()) {
      *bytes = std::string(piece);
      return false;
    }
    bytes->push_back(byte->second);
    rest.remove_prefix(symbol.size());
  }
  return true;
}

class Reader {
 public:
  explicit Reader(const std::string& directory) : directory_(directory) {}
  absl::StatusOr<TokenizerData> Read();

 private:
  std::string Path(const char* name) const { return absl::StrCat(directory_, "/", name); }

  absl::Status ReadTokenizerJson();
  absl::Status ReadVocabAndMerges();
  absl::Status AddVocab(const std::string& file, const json& vocab);
  absl::Status AddToken(const std::string& file, const std::string& piece, int64_t id);
  absl::Status FindByteTokens();
  absl::Status ReadMergesText(const std::string& file);
  absl::Status ReadMerges(const json& merges);
  absl::Status AddMerge(absl::string_view left, absl::string_view right);
  absl::Status AddMergeLine(absl::string_view line);
  absl::Status AddMergeEntry(const json& entry);
  absl::Status AddTokens(const std::vector<TokenToAdd>& tokens);
  absl::StatusOr<int32_t> AddedId(const TokenToAdd& token);
  void FindAddedTokens();
  absl::Status Surround();

  const std::string directory_;
  TokenizerData data_;
  std::string vocab_file_;
  absl::flat_hash_map<std::string, int32_t> ids_;
  int32_t vocab_tokens_ = 0;  // before any is added
  TokenizerSettings settings_;
  Surroundings surroundings_;

  std::map<int32_t, TokenToAdd> added_;  // by their ids
  size_t added_bytes_ = 0;
};

absl::StatusOr<TokenizerData> Reader::Read() {
  const bool has_vocab = FileExists(Path("vocab.json")), has_merges = FileExists(Path("merges.txt"));
  if (FileExists(Path("tokenizer.json"))) {
    RETURN_IF_ERROR(ReadTokenizerJson());
  } else if (has_vocab && has_merges) {
    RETURN_IF_ERROR(ReadVocabAndMerges());
  } else if (has_vocab || has_merges) {
    return Malformed(Path(has_vocab ? "vocab.json" : "merges.txt"),
                     absl::StrCat("there is no ", has_vocab ? "merges.txt" : "vocab.json", " beside it"));
  } else {
    return absl::NotFoundError(
        absl::StrCat(directory_, " holds no tokenizer: neither vocab.json and merges.txt nor tokenizer.json"));
  }
  RETURN_IF_ERROR(AddTokens(settings_.tokens_of_json));
  RETURN_IF_ERROR(AddTokens(settings_.tokens));
  FindAddedTokens();
  RETURN_IF_ERROR(Surround());
  for (TokenizerData::Token& token : data_.tokens) BytesOfPiece(token.piece, &token.bytes);
  return std::move(data_);
}

absl::Status Reader::ReadTokenizerJson() {
  vocab_file_ = Path("tokenizer.json");
  ASSIGN_OR_RETURN(const json root, ReadJsonFile(vocab_file_, nullptr));
  RETURN_IF_ERROR(CheckIsBpe(vocab_file_, root));
  ASSIGN_OR_RETURN(settings_, ReadTokenizerSettings(directory_, &root));
  TextPipeline pipeline{.add_prefix_space = settings_.add_prefix_space};
  if (settings_.generic) {
    ASSIGN_OR_RETURN(pipeline, ReadTextPipeline(vocab_file_, root));
  }
  data_.add_prefix_space = pipeline.add_prefix_space;
  data_.splits_words = pipeline.splits_words;
  ASSIGN_OR_RETURN(surroundings_, ReadPostProcessor(vocab_file_, root));

  const json& model = Member(root, "model");
  RETURN_IF_ERROR(AddVocab(vocab_file_, Member(model, "vocab")));
  if (pipeline.ignore_merges) {
    std::string bytes;
    for (const auto& [piece, id] : ids_) {
      if (BytesOfPiece(piece, &bytes)) data_.words.emplace(bytes, id);
    }
  }
  // Only GPT2Tokenizer takes no merges for none at all.
  if (!settings_.generic && !model.contains("merges")) return absl::OkStatus();
  return ReadMerges(Member(model, "merges"));
}

absl::Status Reader::ReadVocabAndMerges() {
  vocab_file_ = Path("vocab.json");
  ASSIGN_OR_RETURN(settings_, ReadTokenizerSettings(directory_, nullptr));
  data_.add_prefix_space = settings_.add_prefix_space;
  ASSIGN_OR_RETURN(const json vocab, ReadJsonFile(vocab_file_, nullptr));
  RETURN_IF_ERROR(AddVocab(vocab_file_, vocab));
  return ReadMergesText(Path("merges.txt"));
}

absl::Status Reader::AddVocab(const std::string& file, const json& vocab) {
  if (!vocab.is_object()) return Malformed(file, "the vocabulary is not an object");
  for (const auto& [piece, id] : vocab.items()) {
    if (!id.is_number_integer()) {
      return Malformed(file, absl::StrCat("the id of ", QuotedText(piece), " is not an integer"));
    }
    RETURN_IF_ERROR(AddToken(file, piece, id.get<int64_t>()));
  }
  vocab_tokens_ = static_cast<int32_t>(vocab.size());
  return FindByteTokens();
}

absl::Status Reader::AddToken(const std::string& file, const std::string& piece, int64_t id) {
  if (piece.empty()) return Malformed(file, absl::StrCat("the token with id ", id, " is empty"));
  if (id < 0 || id >= kMaxTokens) {
    return Malformed(
        file, absl::StrCat("the id of ", QuotedText(piece), " is ", id, "; the limits are 0 and ", kMaxTokens - 1));
  }
  if (static_cast<size_t>(id) >= data_.tokens.size()) data_.tokens.resize(id + 1);
  std::string& holder = data_.tokens[id].piece;
  if (!holder.empty()) {
    return Malformed(file,
                     absl::StrCat("id ", id, " belongs to both ", QuotedText(holder), " and ", QuotedText(piece)));
  }
  ids_[piece] = static_cast<int32_t>(id);
  holder = piece;
  return absl::OkStatus();
}

absl::Status Reader::FindByteTokens() {
  for (int byte = 0; byte < 256; ++byte) {
    const auto id = ids_.find(ByteSymbol(byte));
    if (id == ids_.end()) return Malformed(vocab_file_, absl::StrCat("no token for byte 0x", absl::Hex(byte)));
    data_.byte_ids[byte] = id->second;
  }
  return absl::OkStatus();
}

absl::Status Reader::ReadMergesText(const std::string& file) {
  ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(file, kMaxTextFileBytes));
  if (absl::StartsWith(text, "\xEF\xBB\xBF")) return Malformed(file, "begins with a byte order mark");
  int line_number = 0;
  absl::string_view rest = text;
  while (!rest.empty()) {
    ++line_number;
    const size_t end = std::min(rest.find('\n'), rest.size());
    absl::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (absl::EndsWith(line, "\r")) line.remove_suffix(1);
    if (absl::StartsWith(line, "#version")) continue;
    const absl::Status status = AddMergeLine(line);
    if (!status.ok()) return Malformed(file, absl::StrCat("line ", line_number, ": ", status.message()));
  }
  return absl::OkStatus();
}

absl::Status Reader::ReadMerges(const json& merges) {
  if (!merges.is_array()) return Malformed(vocab_file_, "model.merges is not an array");
  for (size_t i = 0; i < merges.size(); ++i) {
    const absl::Status status = AddMergeEntry(merges[i]);
    if (!status.ok()) return Malformed(vocab_file_, absl::StrCat("model.merges[", i, "]: ", status.message()));
  }
  return absl::OkStatus();
}

absl::Status Reader::AddMerge(absl::string_view left, absl::string_view right) {
  const std::string result = absl::StrCat(left, right);
  int32_t merge[3];
  int32_t* slot = merge;
  for (const absl::string_view piece : {left, right, absl::string_view(result)}) {
    const auto id = ids_.find(piece);
    if (id == ids_.end()) {
      return absl::InvalidArgumentError(absl::StrCat(QuotedText(piece), " is not in the vocabulary"));
    }
    *slot++ = id->second;
  }
  data_.merges.push_back({merge[0], merge[1], merge[2]});
  return absl::OkStatus();
}

absl::Status Reader::AddMergeLine(absl::string_view line) {
  const size_t space = line.find(' ');
  if (space == absl::string_view::npos || line.find(' ', space + 1) != absl::string_view::npos) {
    return absl::InvalidArgumentError(absl::StrCat(QuotedText(line), " is not two tokens with a space between them"));
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

// AddedVocabulary::add_tokens of Hugging Face's tokenizers: of a token that is added twice the later flags count, but
// special is special.
absl::Status Reader::AddTokens(const std::vector<TokenToAdd>& tokens) {
  for (const TokenToAdd& token : tokens) {
    if (token.content.empty()) continue;
    ASSIGN_OR_RETURN(const int32_t id, AddedId(token));
    data_.tokens[id].special = data_.tokens[id].special || token.special;
    added_[id] = token;
    added_bytes_ += token.content.size();
    if (added_bytes_ > kMaxAddedBytes) {
      return Malformed(token.file, absl::StrCat("the added tokens have more than ", kMaxAddedBytes, " bytes"));
    }
  }
  return absl::OkStatus();
}

// That of the vocabulary, or the next one behind all, whatever a file says.
absl::StatusOr<int32_t> Reader::AddedId(const TokenToAdd& token) {
  constexpr size_t kMostRemarks = 8;
  const auto known = ids_.find(token.content);
  const int64_t id =
      known != ids_.end() ? known->second : std::max(added_.empty() ? 0 : added_.rbegin()->first + 1, vocab_tokens_);
  if (token.id.value_or(id) != id) {
    std::string remark = absl::StrCat(token.file, ": the id of the added token ", QuotedText(token.content), " is ",
                                      *token.id, ", but Transformers gives it ", id, ", and so it is here");
    auto& remarks = data_.remarks;
    const bool is_new = std::find(remarks.begin(), remarks.end(), remark) == remarks.end();
    if (is_new && remarks.size() < kMostRemarks) remarks.push_back(std::move(remark));
  }
  if (known == ids_.end()) RETURN_IF_ERROR(AddToken(token.file, token.content, id));
  return static_cast<int32_t>(id);
}

void Reader::FindAddedTokens() {
  for (const auto& [id, token] : added_) {
    data_.added.push_back({.content = token.content,
                           .id = id,
                           .special = data_.tokens[id].special,
                           .single_word = token.single_word,
                           .lstrip = token.lstrip,
                           .rstrip = token.rstrip,
                           .normalized = token.is_normalized()});
  }
}

// Without a tokenizer.json, the settings say what stands around a prompt.
absl::Status Reader::Surround() {
  for (const auto& [adds, token, side] : {std::tuple(settings_.add_bos_token, &settings_.bos, &surroundings_.before),
                                          std::tuple(settings_.add_eos_token, &settings_.eos, &surroundings_.behind)}) {
    if (!adds || !token->has_value()) continue;
    const auto id = ids_.find(**token);
    // Transformers writes it into a template, in which these have a meaning.
    if (id == ids_.end() || (*token)->find_first_of(" \t\n\v\f\r:$") != std::string::npos) {
      return Malformed(Path("tokenizer_config.json"),
                       absl::StrCat("cannot put ", QuotedText(**token), " around a prompt"));
    }
    side->push_back(id->second);
  }
  const std::pair<const std::vector<int64_t>*, std::vector<int32_t>*> sides[] = {
      {&surroundings_.before, &data_.before}, {&surroundings_.behind, &data_.behind}};
  for (const auto& [from, to] : sides) {
    for (const int64_t id : *from) {
      if (id < 0 || id >= kMaxTokens) {
        return Malformed(vocab_file_,
                         absl::StrCat("post_processor: id ", id, "; the limits are 0 and ", kMaxTokens - 1));
      }
      to->push_back(static_cast<int32_t>(id));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TokenizerData> ReadTokenizerFiles(const std::string& directory) { return Reader(directory).Read(); }

}  // namespace dejavu
