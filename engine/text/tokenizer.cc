// Encoding, as in Hugging Face's ByteLevel + BPE: a regular expression cuts the text into pieces; each piece begins as
// one symbol per byte, and again and again the neighbours whose merge has the lowest rank (of equals, the leftmost)
// become one symbol. A heap of candidates over a linked list of symbols keeps a piece of n bytes at O(n log n).
#include "engine/text/tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <new>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "engine/text/tokenizer_files.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"

namespace dejavu {
namespace {

// Unicode's White_Space, which is what \s means to Hugging Face; PCRE2's \s has U+180E besides.
#define SPACES R"(\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})"
// GPT-2's split. \p{L} and \p{N} are those of PCRE2's Unicode (14 in Debian 12): letters younger than that count as
// symbols. The possessive ++ changes nothing but the work: nothing follows that could give characters back.
constexpr char kSplitPattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}++| ?\p{N}++| ?[^\p{L}\p{N})" SPACES
                                 R"(]++|[)" SPACES R"(]+(?![^)" SPACES R"(])|[)" SPACES R"(]++)";
#undef SPACES

struct CodeFree {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
struct MatchDataFree {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};
using MatchData = std::unique_ptr<pcre2_match_data, MatchDataFree>;

class ByteLevelBpe final : public Tokenizer {
 public:
  explicit ByteLevelBpe(TokenizerData data);

  std::vector<int32_t> Encode(absl::string_view text) const override;
  absl::string_view Bytes(int32_t id) const override {
    return IsToken(id) && !data_.tokens[id].special ? data_.tokens[id].bytes : absl::string_view();
  }
  bool IsSpecial(int32_t id) const override { return IsToken(id) && data_.tokens[id].special; }
  absl::string_view Piece(int32_t id) const override {
    return IsToken(id) ? data_.tokens[id].piece : absl::string_view();
  }
  int32_t vocab_size() const override { return static_cast<int32_t>(data_.tokens.size()); }
  size_t longest_token_bytes() const override { return longest_token_bytes_; }
  int32_t bos_id() const override { return data_.bos_id; }
  int32_t eos_id() const override { return data_.eos_id; }

 private:
  struct Symbol {
    int32_t id;              // -1 once merged into its left neighbour
    int32_t previous, next;  // -1 at the ends
  };
  // What one Encode reuses from piece to piece.
  struct Scratch {
    std::vector<Symbol> symbols;
    std::vector<uint64_t> candidates;  // min-heap of rank << 32 | index of the left symbol
    MatchData match;
  };

  bool IsToken(int32_t id) const { return id >= 0 && id < vocab_size(); }
  void EncodeWellFormed(absl::string_view text, Scratch& scratch, std::vector<int32_t>& ids) const;
  void EncodePiece(absl::string_view piece, Scratch& scratch, std::vector<int32_t>& ids) const;
  // The rank of merging the symbol at `left` with its right neighbour, or -1.
  int32_t Rank(const std::vector<Symbol>& symbols, int32_t left) const;
  void AddCandidate(Scratch& scratch, int32_t left) const;

  // Constant after construction.
  const TokenizerData data_;
  size_t longest_token_bytes_ = 1;
  absl::flat_hash_map<uint64_t, int32_t> ranks_;  // left id << 32 | right id -> index in data_.merges
  std::unique_ptr<pcre2_code, CodeFree> split_;
};

uint64_t PairKey(int32_t high, int32_t low) { return static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(low); }

ByteLevelBpe::ByteLevelBpe(TokenizerData data) : data_(std::move(data)) {
  ranks_.reserve(data_.merges.size());
  for (size_t rank = 0; rank < data_.merges.size(); ++rank) {
    ranks_[PairKey(data_.merges[rank].left, data_.merges[rank].right)] = static_cast<int32_t>(rank);
  }
  for (const auto& token : data_.tokens) longest_token_bytes_ = std::max(longest_token_bytes_, token.bytes.size());
  int error;
  size_t offset;
  split_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(kSplitPattern), PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP,
                             &error, &offset, nullptr));
  if (split_ == nullptr && error == PCRE2_ERROR_HEAP_FAILED) throw std::bad_alloc();
  CHECK(split_ != nullptr) << "split pattern: error " << error << " at " << offset;
  // Where this fails (no executable memory), pcre2_match interprets: the same result, only later.
  pcre2_jit_compile(split_.get(), PCRE2_JIT_COMPLETE);
}

std::vector<int32_t> ByteLevelBpe::Encode(absl::string_view text) const {
  CHECK(text.size() < std::numeric_limits<int32_t>::max()) << "text of " << text.size() << " bytes";
  std::vector<int32_t> ids;
  Scratch scratch;
  scratch.match.reset(pcre2_match_data_create(1, nullptr));
  if (scratch.match == nullptr) throw std::bad_alloc();
  while (!text.empty()) {
    // A well-formed stretch is split by the pattern; the ill-formed bytes up to the next one are a piece.
    size_t length = 0;
    Utf8Step step;
    while (length < text.size() && (step = FirstUtf8Step(text.substr(length))).kind == Utf8Kind::kWhole) {
      length += step.length;
    }
    EncodeWellFormed(text.substr(0, length), scratch, ids);
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

void ByteLevelBpe::EncodeWellFormed(absl::string_view text, Scratch& scratch, std::vector<int32_t>& ids) const {
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const size_t* match = pcre2_get_ovector_pointer(scratch.match.get());
  for (size_t begin = 0; begin < text.size(); begin = match[1]) {
    // Checking UTF-8 here would look at the whole text for every piece.
    const int result =
        pcre2_match(split_.get(), subject, text.size(), begin, PCRE2_NO_UTF_CHECK, scratch.match.get(), nullptr);
    if (result == PCRE2_ERROR_NOMEMORY) throw std::bad_alloc();
    // The pattern matches at every character, and never backtracks over more than one.
    CHECK(result > 0 && match[0] == begin) << "split: " << result << " at " << begin;
    EncodePiece(text.substr(begin, match[1] - begin), scratch, ids);
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

std::vector<int32_t> Tokenizer::EncodePrompt(absl::string_view text) const {
  std::vector<int32_t> ids = Encode(text);
  ids.insert(ids.begin(), bos_id());
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

void Detokenizer::Append(int32_t id, std::string* text) {
  const bool written_out = !skip_special_tokens_ && tokenizer_.IsSpecial(id);
  const absl::string_view bytes = written_out ? tokenizer_.Piece(id) : tokenizer_.Bytes(id);
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
