// Option: one key of the configuration, with what may be written to it. Plain data; one thread.
#ifndef CONFIG_OPTION_H_
#define CONFIG_OPTION_H_

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "engine/options.h"
#include "engine/sparsity.h"

namespace dejavu {

struct Option {
  std::string key;    // "kv.block_tokens": a key of the section `kv`
  std::string group;  // heading in --help
  std::string help;   // one line, with the unit
  std::variant<std::string*, Tier*, bool*, int*, int64_t*, double*> target;
  Limits limits = {};                                        // numbers only
  std::vector<std::string> choices = {};                     // text only; empty: any. Of a tier: its names in order
  absl::Status (*check)(absl::string_view value) = nullptr;  // strings only; what no list can say

  bool is_text() const { return std::holds_alternative<std::string*>(target) || std::holds_alternative<Tier*>(target); }
  bool is_bool() const { return std::holds_alternative<bool*>(target); }
};

std::string FlagName(absl::string_view key);         // "--kv-block-tokens"
std::string EnvironmentName(absl::string_view key);  // "DEJAVUD_KV_BLOCK_TOKENS"

// Writes `text` to the option's target, or says which value breaks which limit.
absl::Status SetOption(const Option& option, absl::string_view text);

// The target's present value: `true`, `16`, `0.5`, or a string as it is.
std::string OptionText(const Option& option);

// "1 to 1024", "auto, cpu or cuda", "true or false"; empty: any text.
std::string LimitText(const Option& option);

// The one of `candidates` that was probably meant, or empty.
std::string Nearest(absl::string_view wrong, const std::vector<std::string>& candidates);

}  // namespace dejavu

#endif  // CONFIG_OPTION_H_
