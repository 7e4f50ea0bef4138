// What the files beside a vocabulary say of it, put together as AutoTokenizer of Transformers 5 does: which class reads
// the vocabulary, what stands before and behind a prompt, and which tokens are added. Any thread.
#ifndef ENGINE_TEXT_TOKENIZER_SETTINGS_H_
#define ENGINE_TEXT_TOKENIZER_SETTINGS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace dejavu {

// A token to be added to a vocabulary, unless it is in there.
struct TokenToAdd {
  std::string content;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool special = false;
  std::optional<bool> normalized;  // absent: where it is not special
  bool plain = false;              // only its content is known
  std::string file;                // that names it
  std::optional<int64_t> id;       // as the file says

  bool is_normalized() const { return normalized.value_or(!special); }
};

struct TokenizerSettings {
  // TokenizersBackend: a tokenizer.json is obeyed in all it says. Else GPT2Tokenizer, which takes no more than
  // vocabulary, merges and post-processor from there.
  bool generic = false;
  bool add_prefix_space = false;  // of GPT2Tokenizer
  bool add_bos_token = false;     // never where there is a tokenizer.json, which says it itself
  bool add_eos_token = false;
  std::optional<std::string> bos, eos;     // named by a file or by the class
  std::vector<TokenToAdd> tokens_of_json;  // a generic tokenizer's own, which come first
  std::vector<TokenToAdd> tokens;          // in the order in which they get their ids
};

// From tokenizer_config.json, special_tokens_map.json, added_tokens.json and config.json, as far as there are such.
// `tokenizer_json`: the tokenizer.json, null where there is none. INVALID_ARGUMENT with file and reason.
absl::StatusOr<TokenizerSettings> ReadTokenizerSettings(const std::string& directory,
                                                        const nlohmann::json* tokenizer_json);

}  // namespace dejavu

#endif  // ENGINE_TEXT_TOKENIZER_SETTINGS_H_
