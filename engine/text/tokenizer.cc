// Encoding, as in Hugging Face's ByteLevel + BPE: a regular expression cuts the text into pieces; each piece begins as
// one symbol per byte, and again and again the neighbours whose merge has the lowest rank (of equals, the leftmost)
// become one symbol. A heap of candidates over a linked list of symbols keeps a piece of n bytes at O(n log n).
#include "engine/text/tokenizer.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "engine/text/added_tokens.h"
#include "engine/text/pattern.h"
#include "engine/text/tokenizer_files.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"

namespace dejavu {
namespace {

// Unicode's White_Space, which is what \s means to Hugging Face; PCRE2's \s has U+180E besides.
#define SPACES R"(\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})"
// Letters and numbers of Unicode 15, 15.1 and 16, which PCRE2's Unicode (14 in Debian 12) does not know yet.
#define YOUNG_LETTERS                                                                                              \
  R"(\x{1c89}\x{1c8a}\x{a7cb}-\x{a7cd}\x{a7da}-\x{a7dc}\x{105c0}-\x{105f3}\x{10d4a}-\x{10d65}\x{10d6f}-\x{10d85})" \
  R"(\x{10ec2}-\x{10ec4}\x{1123f}\x{11240}\x{11380}-\x{11389}\x{1138b}\x{1138e}\x{11390}-\x{113b5}\x{113b7})"      \
  R"(\x{113d1}\x{113d3}\x{11bc0}-\x{11be0}\x{11f02}\x{11f04}-\x{11f10}\x{11f12}-\x{11f33}\x{1342f})"               \
  R"(\x{13441}-\x{13446}\x{13460}-\x{143fa}\x{16100}-\x{1611d}\x{16d40}-\x{16d6c}\x{18cff}\x{1b132}\x{1b155})"     \
  R"(\x{1df25}-\x{1df2a}\x{1e030}-\x{1e06d}\x{1e4d0}-\x{1e4eb}\x{1e5d0}-\x{1e5ed}\x{1e5f0}\x{2b739})"              \
  R"(\x{2ebf0}-\x{2ee5d}\x{31350}-\x{323af})"
#define YOUNG_NUMBERS                                                                                  \
  R"(\x{10d40}-\x{10d49}\x{116d0}-\x{116e3}\x{11bf0}-\x{11bf9}\x{11f50}-\x{11f59}\x{16130}-\x{16139})" \
  R"(\x{16d70}-\x{16d79}\x{1ccf0}-\x{1ccf9}\x{1d2c0}-\x{1d2d3}\x{1e4f0}-\x{1e4f9}\x{1e5f1}-\x{1e5fa})"
#define LETTERS R"(\p{L})" YOUNG_LETTERS
#define NUMBERS R"(\p{N})" YOUNG_NUMBERS
// GPT-2's split. The possessive ++ changes nothing but the work: nothing follows that could give characters back.
constexpr char kSplitPattern[] = "'s|'t|'re|'ve|'m|'ll|'d| ?[" LETTERS "]++| ?[" NUMBERS
                                 "]++| ?[^" LETTERS NUMBERS SPACES "]++|[" SPACES "]+(?![^" SPACES "])|[" SPACES "]++";
#undef NUMBERS
#undef LETTERS
#undef YOUNG_NUMBERS
#undef YOUNG_LETTERS
#undef SPACES

class ByteLevelBpe final : public Tokenizer {
 public:
  explicit ByteLevelBpe(TokenizerData data);

  std::vector<int32_t> Encode(absl::string_view text, bool parse_special_tokens) const override;
  absl::Span<const int32_t> before_prompt() const override { return data_.before; }
  absl::Span<const int32_t> behind_prompt() const override { return data_.behind; }
  absl::string_view Bytes(int32_t id) const override {
    return IsToken(id) ? data_.tokens[id].bytes : absl::string_view();
  }
  bool IsSpecial(int32_t id) const override { return IsToken(id) && data_.tokens[id].special; }
  absl::string_view Piece(int32_t id) const override {
    return IsToken(id) ? data_.tokens[id].piece : absl::string_view();
  }
  int32_t SpecialId(absl::string_view text) const override;
  int32_t vocab_size() const override { return static_cast<int32_t>(data_.tokens.size()); }
  absl::Span<const int32_t> unused_ids() const override { return unused_ids_; }
  size_t longest_token_bytes() const override { return longest_token_bytes_; }
  absl::Span<const std::string> remarks() const override { return data_.remarks; }

 private:
  struct Symbol {
    int32_t id;              // -1 once merged into its left neighbour
    int32_t previous, next;  // -1 at the ends
  };
  // What one Encode reuses from piece to piece.
  struct Scratch {
    std::vector<Symbol> symbols;
    std::vector<uint64_t> candidates;  // min-heap of rank << 32 | index of the left symbol
    std::string prefixed;
    Pattern::Scratch match;
  };

  bool IsToken(int32_t id) const { return id >= 0 && id < vocab_size(); }
  // A stretch between added tokens.
  void EncodeStretch(absl::string_view text, Scratch& scratch, std::vector<int32_t>& ids) const;
  void EncodePiece(absl::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;
  // The rank of merging the symbol at `left` with its right neighbour, or -1.
  int32_t Rank(const std::vector<Symbol>& symbols, int32_t left) const;
  void AddCandidate(Scratch& scratch, int32_t left) const;

  // Constant after construction.
  const TokenizerData data_;
  const AddedTokens added_;
  const Pattern split_;
  size_t longest_token_bytes_ = 1;
  std::vector<int32_t> unused_ids_;
  absl::flat_hash_map<uint64_t, int32_t> ranks_;  // left id << 32 | right id -> index in data_.merges
};

uint64_t PairKey(int32_t high, int32_t low) { return static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(low); }

ByteLevelBpe::ByteLevelBpe(TokenizerData data) : data_(std::move(data)), added_(data_.added), split_(kSplitPattern) {
  ranks_.reserve(data_.merges.size());
  for (size_t rank = 0; rank < data_.merges.size(); ++rank) {
    ranks_[PairKey(data_.merges[rank].left, data_.merges[rank].right)] = static_cast<int32_t>(rank);
  }
  for (int32_t id = 0; id < vocab_size(); ++id) {
    longest_token_bytes_ = std::max(longest_token_bytes_, data_.tokens[id].bytes.size());
    if (data_.tokens[id].piece.empty()) unused_ids_.push_back(id);
  }
  // What was added stands for itself in a text, whatever becomes of it on the way back.
  for (const AddedToken& token : data_.added) {
    longest_token_bytes_ = std::max(longest_token_bytes_, token.content.size());
  }
  const bool takes_spaces =
      std::any_of(data_.added.begin(), data_.added.end(), [](const AddedToken& t) { return t.lstrip || t.rstrip; });
  if (takes_spaces) longest_token_bytes_ = std::numeric_limits<int32_t>::max();
}

int32_t ByteLevelBpe::SpecialId(absl::string_view text) const {
  const auto found = std::find_if(data_.added.begin(), data_.added.end(), [&](const AddedToken& token) {
    return token.special && data_.tokens[token.id].bytes == text;
  });
  return found == data_.added.end() ? -1 : found->id;
}

std::vector<int32_t> ByteLevelBpe::Encode(absl::string_view text, bool parse_special_tokens) const {
  CHECK(text.size() < std::numeric_limits<int32_t>::max()) << "text of " << text.size() << " bytes";
  std::vector<int32_t> ids;
  Scratch scratch;
  while (!text.empty()) {
    // A well-formed stretch is split by the patterns; the ill-formed bytes up to the next one are a piece.
    size_t length = 0;
    Utf8Step step;
    while (length < text.size() && (step = FirstUtf8Step(text.substr(length))).kind == Utf8Kind::kWhole) {
      length += step.length;
    }
    added_.Split(text.substr(0, length), parse_special_tokens, [&](absl::string_view part, int32_t id) {
      if (id >= 0) {
        ids.push_back(id);
      } else {
        EncodeStretch(part, scratch, ids);
      }
    });
    text.remove_prefix(length);
    length = 0;
    while (length < text.size() && (step = FirstUtf8Step(text.substr(length))).kind != Utf8Kind::kWhole) {
      length += step.length;
    }
    EncodePiece(text.substr(0, length), scratch, ids);
    text.remove_prefix(length);
  }
  return ids;
}

void ByteLevelBpe::EncodeStretch(absl::string_view text, Scratch& scratch, std::vector<int32_t>& ids) const {
  if (data_.add_prefix_space && text[0] != ' ') {
    scratch.prefixed.assign(" ");
    scratch.prefixed.append(text.data(), text.size());
    text = scratch.prefixed;
  }
  if (!data_.splits_words) return EncodePiece(text, scratch, ids);
  for (size_t begin = 0, length; begin < text.size(); begin += length) {
    length = split_.Match(text, begin, scratch.match);
    // The pattern matches at every character, and never backtracks over more than one.
    CHECK(length > 0) << "split at " << begin;
    EncodePiece(text.substr(begin, length), scratch, ids);
  }
}

int32_t ByteLevelBpe::Rank(const std::vector<Symbol>& symbols, int32_t left) const {
  const int32_t right = symbols[left].next;
  if (right < 0) return -1;
  const auto rank = ranks_.find(PairKey(symbols[left].id, symbols[right].id));
  return rank == ranks_.end() ? -1 : rank->second;
}

void ByteLevelBpe::AddCandidate(Scratch& scratch, int32_t left) const {
  const int32_t rank = Rank(scratch.symbols, left);
  if (rank < 0) return;
  scratch.candidates.push_back(PairKey(rank, left));
  std::push_heap(scratch.candidates.begin(), scratch.candidates.end(), std::greater<>());
}

void ByteLevelBpe::EncodePiece(absl::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const {
  if (!data_.words.empty()) {
    const auto word = data_.words.find(piece);
    if (word != data_.words.end()) return ids.push_back(word->second);
  }
  std::vector<Symbol>& symbols = scratch.symbols;
  std::vector<uint64_t>& candidates = scratch.candidates;
  const int32_t size = static_cast<int32_t>(piece.size());
  symbols.clear();
  for (int32_t i = 0; i < size; ++i) {
    symbols.push_back({data_.byte_ids[static_cast<uint8_t>(piece[i])], i - 1, i + 1 < size ? i + 1 : -1});
  }
  for (int32_t i = 0; i < size; ++i) AddCandidate(scratch, i);

  while (!candidates.empty()) {
    const TokenizerData::Merge& merge = data_.merges[candidates.front() >> 32];
    const int32_t left = static_cast<int32_t>(candidates.front() & 0xFFFFFFFF);
    std::pop_heap(candidates.begin(), candidates.end(), std::greater<>());
    candidates.pop_back();
    // Stale, unless the pair at that place now still makes the same token.
    if (symbols[left].id < 0) continue;
    const int32_t rank = Rank(symbols, left);
    if (rank < 0 || data_.merges[rank].result != merge.result) continue;

    Symbol& right = symbols[symbols[left].next];
    right.id = -1;
    symbols[left].id = merge.result;
    symbols[left].next = right.next;
    if (right.next >= 0) symbols[right.next].previous = left;
    if (symbols[left].previous >= 0) AddCandidate(scratch, symbols[left].previous);
    AddCandidate(scratch, left);
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.id >= 0) ids.push_back(symbol.id);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& directory) {
  ASSIGN_OR_RETURN(TokenizerData data, ReadTokenizerFiles(directory));
  return std::make_unique<ByteLevelBpe>(std::move(data));
}

std::vector<int32_t> Tokenizer::EncodePrompt(absl::string_view text, bool parse_special_tokens) const {
  std::vector<int32_t> ids = Encode(text, parse_special_tokens);
  ids.insert(ids.begin(), before_prompt().begin(), before_prompt().end());
  ids.insert(ids.end(), behind_prompt().begin(), behind_prompt().end());
  return ids;
}

std::string Tokenizer::Decode(absl::Span<const int32_t> ids, bool skip_special_tokens) const {
  Detokenizer detokenizer(*this, skip_special_tokens);
  std::string text;
  for (const int32_t id : ids) detokenizer.Append(id, &text);
  detokenizer.Flush(&text);
  return text;
}

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens)
    : tokenizer_(tokenizer), skip_special_tokens_(skip_special_tokens) {}

void Detokenizer::Prime(absl::Span<const int32_t> prompt) {
  // A character has at most four bytes, so that what stands before the last four tokens that have any is of no
  // consequence.
  constexpr int kMostBytes = 4;
  size_t first = prompt.size();
  for (int with_bytes = 0; first > 0 && with_bytes < kMostBytes; --first) {
    const int32_t id = prompt[first - 1];
    if (!(skip_special_tokens_ && tokenizer_.IsSpecial(id)) && !tokenizer_.Bytes(id).empty()) ++with_bytes;
  }
  std::string text;
  for (const int32_t id : prompt.subspan(first)) Append(id, &text);
}

void Detokenizer::Append(int32_t id, std::string* text) {
  if (skip_special_tokens_ && tokenizer_.IsSpecial(id)) return;
  const absl::string_view bytes = tokenizer_.Bytes(id);
  pending_.append(bytes.data(), bytes.size());
  absl::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Step step = FirstUtf8Step(rest);
    if (step.kind == Utf8Kind::kIncomplete) break;
    if (step.kind == Utf8Kind::kWhole) {
      text->append(rest.data(), step.length);
    } else {
      text->append(kReplacementCharacter);
    }
    rest.remove_prefix(step.length);
  }
  pending_.erase(0, pending_.size() - rest.size());
}

void Detokenizer::Flush(std::string* text) {
  if (!pending_.empty()) text->append(kReplacementCharacter);
  pending_.clear();
}

}  // namespace dejavu
