// AddedTokens: the tokens that are looked for in a text before it is cut into words, as Hugging Face's AddedVocabulary
// does it: special tokens, and others that were added to a trained vocabulary. Immutable after construction; any
// thread.
#ifndef ENGINE_TEXT_ADDED_TOKENS_H_
#define ENGINE_TEXT_ADDED_TOKENS_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/strings/string_view.h"
#include "engine/text/pattern.h"

namespace dejavu {

// Its content is not empty. Flags as in a tokenizer.json.
struct AddedToken {
  std::string content;
  int32_t id = -1;
  bool special = false;      // found only where special tokens are parsed
  bool single_word = false;  // found only where no letter, digit or the like is beside it
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;
  bool normalized = false;  // looked for after all the others, in what these leave
};

class AddedTokens {
 public:
  explicit AddedTokens(const std::vector<AddedToken>& tokens);

  // Hears of a stretch of the text, and of the token that was found there, or -1.
  using Part = absl::FunctionRef<void(absl::string_view text, int32_t id)>;
  // The parts of `text`, well-formed UTF-8, in order; those without a token are not empty. Special tokens that are not
  // parsed are found, too, so that none is found that begins within one; but they are text. Linear in the text,
  // whatever the tokens are.
  void Split(absl::string_view text, bool parse_special, Part part) const;

 private:
  // Where tokens of one kind are. The text is read from its end, through the automaton of Aho and Corasick for the
  // tokens written backwards: then each place knows the longest token that begins there.
  class Finder {
   public:
    void Add(const AddedToken& token);
    void Build();
    bool Finds(bool parse_special) const { return parse_special ? !tokens_.empty() : has_ordinary_; }
    const AddedToken& token(int32_t index) const { return tokens_[index]; }
    struct Found {
      int32_t begin;
      int32_t token;
    };
    // The leftmost first, of those that begin together the longest, none within another.
    std::vector<Found> Find(absl::string_view text) const;

   private:
    struct Node {
      int32_t failure = 0;
      int32_t depth = 0;
      int32_t longest = -1;  // token that ends here; after Build the longest that any suffix of the node ends with
    };
    // -1: none.
    int32_t Child(int32_t node, uint8_t byte) const;

    std::vector<AddedToken> tokens_;
    std::vector<Node> nodes_ = std::vector<Node>(1);
    absl::flat_hash_map<uint64_t, int32_t> children_;  // node << 8 | byte
    std::array<int32_t, 256> of_root_ = {};            // 0: none
    bool has_ordinary_ = false;
  };

  void SplitBy(const Finder& finder, absl::string_view text, bool parse_special, Part part) const;
  bool IsWordBefore(absl::string_view text, size_t at, Pattern::Scratch& scratch) const;

  Finder first_, second_;  // not normalized, normalized
  Pattern word_;
};

}  // namespace dejavu

#endif  // ENGINE_TEXT_ADDED_TOKENS_H_
