// What a tokenizer.json says of how texts are handled, as far as byte-level BPE can do it. Any thread.
#ifndef ENGINE_TEXT_TOKENIZER_JSON_H_
#define ENGINE_TEXT_TOKENIZER_JSON_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace dejavu {

// INVALID_ARGUMENT for a model other than BPE, or a version that is not known.
absl::Status CheckIsBpe(const std::string& file, const nlohmann::json& root);

struct TextPipeline {
  bool add_prefix_space = false;  // a stretch of text that does not begin with a space gets one
  bool splits_words = true;       // by GPT-2's pattern
  bool ignore_merges = false;     // a word that is a token is that token
};
// Of a generic tokenizer, which obeys the file in all it says. INVALID_ARGUMENT with field and reason for what is not
// supported.
absl::StatusOr<TextPipeline> ReadTextPipeline(const std::string& file, const nlohmann::json& root);

// The ids before and behind a prompt.
struct Surroundings {
  std::vector<int64_t> before, behind;
};
absl::StatusOr<Surroundings> ReadPostProcessor(const std::string& file, const nlohmann::json& root);

}  // namespace dejavu

#endif  // ENGINE_TEXT_TOKENIZER_JSON_H_
