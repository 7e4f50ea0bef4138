// Tokenizer: GPT-2 byte-level BPE, as OPT uses it, from tokenizer.json or vocab.json + merges.txt, with the ids that
// AutoTokenizer of Transformers 5 gives. Immutable after loading: any thread, no locks. Detokenizer: one stream's way
// back from ids to text.
#ifndef ENGINE_TEXT_TOKENIZER_H_
#define ENGINE_TEXT_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace dejavu {

class Tokenizer {
 public:
  // NOT_FOUND when the directory holds neither form; INVALID_ARGUMENT with file and reason when one is malformed.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& directory);
  virtual ~Tokenizer() = default;

  // The ids of `text` (any bytes), without what stands around a prompt. Special tokens written out are ordinary text
  // unless they are parsed; other added tokens are always found.
  virtual std::vector<int32_t> Encode(absl::string_view text, bool parse_special_tokens) const = 0;
  std::vector<int32_t> Encode(absl::string_view text) const { return Encode(text, /*parse_special_tokens=*/false); }

  // The same with what the tokenizer puts around a prompt: with OPT </s> before it.
  std::vector<int32_t> EncodePrompt(absl::string_view text, bool parse_special_tokens = false) const;
  virtual absl::Span<const int32_t> before_prompt() const = 0;
  virtual absl::Span<const int32_t> behind_prompt() const = 0;

  // What one token stands for; empty for ids out of range. Valid as long as the tokenizer.
  virtual absl::string_view Bytes(int32_t id) const = 0;
  virtual bool IsSpecial(int32_t id) const = 0;
  // As it is written in the vocabulary ("</s>", "Ġthe"); empty for ids out of range.
  virtual absl::string_view Piece(int32_t id) const = 0;
  // The special token that stands for `text`, or -1.
  virtual int32_t SpecialId(absl::string_view text) const = 0;

  virtual int32_t vocab_size() const = 0;  // the largest id + 1
  // Ids below it that no token has, ascending.
  virtual absl::Span<const int32_t> unused_ids() const = 0;
  // No token stands for more bytes of text: a text of n bytes has at least n / longest_token_bytes tokens. Where a
  // token takes white space beside it, the largest text there may be.
  virtual size_t longest_token_bytes() const = 0;

  // What an operator should know of the files: a few lines, with file and reason.
  virtual absl::Span<const std::string> remarks() const = 0;

  // All ids at once; ill-formed UTF-8 becomes U+FFFD. Special tokens are left out or not.
  std::string Decode(absl::Span<const int32_t> ids, bool skip_special_tokens) const;
};

// Turns ids into text as they come. What Append returns is always whole UTF-8; bytes that may still become a character
// are held back, bytes that never can are replaced by U+FFFD at once (one per maximal ill-formed subpart, as in Unicode
// 15 §3.9 and Hugging Face's decoder).
class Detokenizer {
 public:
  Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens);

  // Begins behind a prompt: what Append returns continues the prompt's last whole character. A character that the
  // prompt begins and the output ends is the output's.
  void Prime(absl::Span<const int32_t> prompt);

  // Appends the text that became certain with this token.
  void Append(int32_t id, std::string* text);
  // The end: what is still held back becomes U+FFFD.
  void Flush(std::string* text);

 private:
  const Tokenizer& tokenizer_;
  const bool skip_special_tokens_;
  std::string pending_;  // at most 3 bytes: a well-formed prefix of one character
};

}  // namespace dejavu

#endif  // ENGINE_TEXT_TOKENIZER_H_
