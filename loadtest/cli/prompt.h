// Where a prompt comes from: an argument, a file, standard input, or token ids.
#ifndef LOADTEST_CLI_PROMPT_H_
#define LOADTEST_CLI_PROMPT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "CLI/App.hpp"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace dejavu {

struct PromptSource {
  CLI::Option* text_flag = nullptr;
  CLI::Option* ids_flag = nullptr;
  std::string text, file, lines_file;
  std::vector<std::string> lines;  // of `lines_file`: several prompts
  std::vector<uint32_t> ids;
  bool parse_special = false;
  std::optional<int32_t> last_tokens;
};

// The flags on `command`. `source` must outlive its parsing.
void AddPromptFlags(CLI::App* command, PromptSource* source, bool with_ids);

// INVALID_ARGUMENT for text that is not UTF-8; `what` names it.
absl::Status CheckUtf8(absl::string_view what, absl::string_view text);

// The flag for several prompts.
void AddLinesFlag(CLI::App* command, PromptSource* source);

// Replaces `source->text` by the prompt, or `source->lines` by the prompts, unless ids were given.
absl::Status ReadPrompt(PromptSource* source);

// Into a request's `oneof prompt`.
template <typename Request>
void SetPrompt(const PromptSource& source, Request* request) {
  if (source.ids_flag != nullptr && source.ids_flag->count() > 0) {
    request->mutable_token_ids()->mutable_ids()->Add(source.ids.begin(), source.ids.end());
  } else {
    request->set_text(source.text);
    request->set_parse_special_tokens(source.parse_special);
  }
  if (source.last_tokens.has_value()) request->set_truncate_prompt_tokens(*source.last_tokens);
}

}  // namespace dejavu

#endif  // LOADTEST_CLI_PROMPT_H_
