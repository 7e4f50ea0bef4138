#include "config/config.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "config/option_table.h"
#include "config/yaml_reader.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr size_t kMostErrors = 20;

std::string SectionOf(absl::string_view key) { return std::string(key.substr(0, key.rfind('.') + 1)); }  // "kv." or ""

// Options by key, and what else may stand in a file.
class Schema {
 public:
  explicit Schema(Config* config) : options_(OptionTable(config)) {
    names_.push_back("version");
    for (const Option& option : options_) {
      names_.push_back(option.key);
      const std::string section = SectionOf(option.key);
      if (!section.empty()) names_.push_back(section.substr(0, section.size() - 1));
    }
  }

  const std::vector<Option>& options() const { return options_; }

  const Option* Find(absl::string_view key) const {
    const auto found = std::find_if(options_.begin(), options_.end(), [&](const Option& o) { return o.key == key; });
    return found == options_.end() ? nullptr : &*found;
  }

  bool IsSection(const std::string& path) const {
    return std::any_of(options_.begin(), options_.end(),
                       [&](const Option& o) { return SectionOf(o.key) == path + "."; });
  }

  std::string Suggestion(absl::string_view wrong) const {
    const std::string nearest = Nearest(wrong, names_);
    return nearest.empty() ? "" : absl::StrCat("; did you mean ", nearest, "?");
  }

 private:
  const std::vector<Option> options_;
  std::vector<std::string> names_;  // of keys and sections
};

// Empty, or what is wrong with one entry of the file. `unknown` collects the paths whose contents need no second
// message.
std::string ApplyEntry(const Schema& schema, const YamlEntry& entry, std::vector<std::string>* unknown) {
  const std::string& path = entry.path;
  if (std::any_of(unknown->begin(), unknown->end(),
                  [&](const std::string& u) { return absl::StartsWith(path, u + "."); })) {
    return "";
  }
  if (path == "version") {
    return entry.value == "1" ? "" : absl::StrCat(entry.value_place, ": version is \"", entry.value, "\"; must be 1");
  }
  if (schema.IsSection(path)) {
    const bool fits = entry.kind == YamlEntry::kMapping || entry.kind == YamlEntry::kNull;
    return fits ? ""
                : absl::StrCat(entry.value_place, ": ", path, " must hold keys, such as `", path,
                               ":` and a `key: value` line below it");
  }
  const Option* option = schema.Find(path);
  if (option == nullptr) {
    unknown->push_back(path);
    return absl::StrCat(entry.key_place, ": unknown key ", path, schema.Suggestion(path));
  }
  const std::string limit = LimitText(*option).empty() ? "text" : LimitText(*option);
  switch (entry.kind) {
    case YamlEntry::kMapping:
    case YamlEntry::kSequence:
      unknown->push_back(path);
      return absl::StrCat(entry.value_place, ": ", path, " is a ",
                          entry.kind == YamlEntry::kMapping ? "mapping" : "list", "; must be one value: ", limit);
    case YamlEntry::kNull:
      return absl::StrCat(entry.key_place, ": ", path, " has no value; must be ", limit,
                          option->is_text() ? " (\"\" for none)" : "");
    case YamlEntry::kQuoted:
      if (option->is_text()) break;
      return absl::StrCat(entry.value_place, ": ", path, " is the text \"", entry.value, "\"; must be ", limit,
                          ", without quotes");
    case YamlEntry::kPlain:
      break;
  }
  const absl::Status set = SetOption(*option, entry.value);
  return set.ok() ? "" : absl::StrCat(entry.value_place, ": ", set.message());
}

// No more than kMostErrors: a large file of something else has one in every line, and each is compared with every key.
std::vector<std::string> ApplyYaml(const Schema& schema, const std::vector<YamlEntry>& entries) {
  std::vector<std::string> errors, unknown;
  for (const YamlEntry& entry : entries) {
    std::string error = ApplyEntry(schema, entry, &unknown);
    if (error.empty()) continue;
    if (errors.size() == kMostErrors) {
      errors.push_back(absl::StrCat(entry.key_place, ": more is wrong from here on"));
      break;
    }
    errors.push_back(std::move(error));
  }
  return errors;
}

std::vector<std::string> ApplyEnvironment(const Schema& schema, const std::map<std::string, std::string>& environment) {
  std::vector<std::string> errors;
  std::map<std::string, const Option*> by_name;
  std::vector<std::string> names = {kConfigVariable};
  for (const Option& option : schema.options()) {
    names.push_back(EnvironmentName(option.key));
    by_name[names.back()] = &option;
  }
  for (const auto& [name, value] : environment) {
    if (name == kConfigVariable) continue;
    const auto found = by_name.find(name);
    if (found == by_name.end()) {
      const std::string nearest = Nearest(name, names);
      errors.push_back(absl::StrCat("environment: unknown variable ", name,
                                    nearest.empty() ? "" : absl::StrCat("; did you mean ", nearest, "?")));
      continue;
    }
    const absl::Status set = SetOption(*found->second, value);
    if (!set.ok()) errors.push_back(absl::StrCat("environment: ", name, ": ", set.message()));
  }
  return errors;
}

// What no key has wrong by itself.
std::vector<std::string> CheckTogether(const Schema& schema, const ServerOptions& server) {
  const auto text = [&](absl::string_view key) {
    return absl::StrCat(key, " is \"", OptionText(*schema.Find(key)), "\"");
  };
  const std::string highest = text("sparsity.highest_tier"), lowest = text("sparsity.lowest_tier");
  std::vector<std::string> errors;
  // A tier of less quality has the larger number.
  if (server.lowest_tier < server.highest_tier) {
    errors.push_back(absl::StrCat(lowest, "; must not be of better quality than the highest: ", highest));
  } else if (server.default_tier < server.highest_tier || server.default_tier > server.lowest_tier) {
    errors.push_back(absl::StrCat(text("sparsity.default_tier"),
                                  "; must be a tier that requests may ask for: ", highest, ", ", lowest));
  }
  if (server.shadow_every != 0 && server.shadow_every < server.min_shadow_every) {
    errors.push_back(absl::StrCat(text("sparsity.shadow_every"), "; must be 0 or at least what requests may name: ",
                                  text("sparsity.min_shadow_every")));
  }
  return errors;
}

// YAML's double-quoted form, which FormatConfig uses for all text.
std::string Quoted(absl::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      absl::StrAppend(&quoted, "\\x", absl::Hex(static_cast<unsigned char>(c), absl::kZeroPad2));
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

}  // namespace

absl::StatusOr<Config> LoadConfig(const ConfigSources& sources) {
  Config config;
  const Schema schema(&config);
  ASSIGN_OR_RETURN(const std::vector<YamlEntry> entries, ReadYaml(sources.yaml, sources.yaml_name));
  std::vector<std::string> errors = ApplyYaml(schema, entries);
  for (std::string& error : ApplyEnvironment(schema, sources.environment)) errors.push_back(std::move(error));
  for (const auto& [key, text] : sources.flags) {
    const Option* option = schema.Find(key);
    const absl::Status set =
        option == nullptr ? absl::InvalidArgumentError(absl::StrCat("unknown key ", key)) : SetOption(*option, text);
    if (!set.ok()) errors.push_back(absl::StrCat(FlagName(key), ": ", set.message()));
  }
  if (errors.empty()) errors = CheckTogether(schema, config.server);
  if (!errors.empty()) return absl::InvalidArgumentError(absl::StrJoin(errors, "\n"));
  return config;
}

std::string FormatConfig(const Config& config) {
  Config copy = config;
  std::string text = "version: 1\n";
  std::string section;
  for (const Option& option : OptionTable(&copy)) {
    const std::string option_section = SectionOf(option.key);
    const std::string indent(option_section.empty() ? 0 : 2, ' ');
    absl::StrAppend(&text, "\n");
    if (option_section != section) {
      absl::StrAppend(&text, option_section.substr(0, option_section.size() - 1), ":\n");
      section = option_section;
    }
    const std::string limit = LimitText(option);
    absl::StrAppend(&text, indent, "# ", option.help, limit.empty() ? "" : absl::StrCat(" (", limit, ")"), "\n");
    const std::string value = option.is_text() ? Quoted(OptionText(option)) : OptionText(option);
    absl::StrAppend(&text, indent, option.key.substr(option_section.size()), ": ", value, "\n");
  }
  return text;
}

}  // namespace dejavu
