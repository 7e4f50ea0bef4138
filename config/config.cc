#include "config/config.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "config/option_table.h"
#include "config/yaml_reader.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int kExitDone = 0;
constexpr int kExitConfiguration = 1;
constexpr int kExitUsage = 2;
constexpr char kConfigVariable[] = "DEJAVUD_CONFIG";  // beside the keys: the path of the file

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

std::vector<std::string> ApplyYaml(const Schema& schema, const std::vector<YamlEntry>& entries) {
  std::vector<std::string> errors, unknown;
  for (const YamlEntry& entry : entries) {
    std::string error = ApplyEntry(schema, entry, &unknown);
    if (!error.empty()) errors.push_back(std::move(error));
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

// What --help shows after the flag: what its value is, or for a switch the way to turn it off.
std::string Placeholder(const Option& option) {
  if (option.is_bool()) return absl::StrCat(", --no-", FlagName(option.key).substr(2));
  if (!option.choices.empty()) return " " + absl::StrJoin(option.choices, "|");
  if (!option.is_text()) return " N";
  if (option.key == "model") return " DIR";
  if (option.key == "predictor") return " FILE";
  if (option.key == "listen") return " HOST:PORT";
  return absl::EndsWith(option.key, "_file") ? " FILE" : " TEXT";
}

std::vector<std::string> DeviceKindNames() {
  std::vector<std::string> names;
  for (const DeviceKind& kind : kDeviceKinds) names.push_back(kind.name);
  return names;
}

std::string HelpText() {
  Config defaults;
  std::string text =
      "dejavud serves an OPT model over gRPC.\n\n"
      "  dejavud --model DIR [flags]\n\n"
      "Every flag is also an environment variable (in brackets) and a key of the YAML file: --kv-block-tokens is\n"
      "block_tokens below kv. A flag wins over the environment, which wins over the file, which wins over the "
      "default.\n\n"
      "  --config FILE       YAML file to read [DEJAVUD_CONFIG]\n"
      "  --check-config      check flags, environment and file; exit 0 if they are good, 1 if not\n"
      "  --print-config      write the configuration in effect as YAML and exit\n"
      "  --plan[=json]       calculate memory and latencies on devices that need not be there (see Planning) and "
      "exit;\n"
      "                      0 if the model fits, 1 if not\n"
      "  --version           write the version and exit\n"
      "  --help              write this and exit\n";
  std::string group;
  for (const Option& option : OptionTable(&defaults)) {
    if (option.group != group) absl::StrAppend(&text, "\n", option.group, ":\n");
    group = option.group;
    std::vector<std::string> notes;
    if (!option.is_text()) notes.push_back(LimitText(option));
    if (!OptionText(option).empty()) notes.push_back(absl::StrCat("default ", OptionText(option)));
    absl::StrAppend(&text, "  ", FlagName(option.key), Placeholder(option), "\n      ", option.help,
                    notes.empty() ? "" : absl::StrCat(" (", absl::StrJoin(notes, "; "), ")"), " [",
                    EnvironmentName(option.key), "]\n");
  }
  const PlanOptions plan;
  absl::StrAppend(&text, "\nPlanning (with --plan; the model, its types and its memory are said by the flags above):\n",
                  "  --plan-device ", absl::StrJoin(DeviceKindNames(), "|"), "\n      kind of device\n",
                  "  --plan-devices N\n      how many; each is a rank (1 to ", kMaxPlanDevices, "; default ",
                  plan.devices, ")\n", "  --plan-memory-gib N\n      memory of each (default: the kind's)\n",
                  "  --plan-bandwidth-gbs N\n      read bandwidth of each in GB/s (default: the kind's data sheet)\n",
                  "  --plan-bandwidth-share N\n      share of it that a decode step reaches (above 0 to 1; default ",
                  plan.bandwidth_share, ")\n",
                  "  --plan-all-reduce-us N\n      time of one all-reduce (default: the kind's)\n",
                  "  --plan-context N\n      tokens of each sequence where latencies are estimated (default ",
                  plan.context_tokens, ")\n");
  absl::StrAppend(
      &text,
      "\nExit codes: 0 drained after SIGTERM or SIGINT; 1 cannot start (configuration, model, port); 2 wrong usage;\n"
      "3 the engine failed; 4 a second signal cut off running requests.\n");
  return text;
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

std::map<std::string, std::string> ProcessEnvironment() {
  std::map<std::string, std::string> variables;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const absl::string_view text = *entry;
    const size_t equals = text.find('=');
    if (equals == text.npos || !absl::StartsWith(text, "DEJAVUD_")) continue;
    variables.emplace(text.substr(0, equals), text.substr(equals + 1));
  }
  return variables;
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kMaxYamlBytes + 1, '\0');  // one more than allowed, for ReadYaml to see
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file.is_open() || file.bad()) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  text.resize(static_cast<size_t>(file.gcount()));
  return text;
}

struct Flags {
  std::string config_path;
  bool check = false, print = false, version = false, help = false;
  std::optional<PlanOptions> plan;
  std::map<std::string, std::string> values;  // by key
};

// What the flags of --plan say, before the device's kind fills in what they leave out.
struct PlanFlags {
  std::string format;  // empty: no plan
  PlanOptions options;

  void AddTo(CLI::App* app) {
    CLI::Option* const plan = app->add_flag("--plan{text}", format)->check(CLI::IsMember({"text", "json"}));
    const auto add = [&](const char* name, auto* value) {
      return app->add_option(name, *value)->needs(plan)->multi_option_policy(CLI::MultiOptionPolicy::Throw);
    };
    constexpr double kMost = 1e6;
    add("--plan-device", &options.device)->check(CLI::IsMember(DeviceKindNames()));
    add("--plan-devices", &options.devices)->check(CLI::Range(1, kMaxPlanDevices));
    add("--plan-memory-gib", &options.memory_gib)->check(CLI::Range(0.001, kMost));
    add("--plan-bandwidth-gbs", &options.bandwidth_gbs)->check(CLI::Range(0.001, kMost));
    add("--plan-bandwidth-share", &options.bandwidth_share)->check(CLI::Range(0.001, 1.0));
    add("--plan-all-reduce-us", &options.all_reduce_us)->check(CLI::Range(0.0, kMost));
    add("--plan-context", &options.context_tokens)->check(CLI::Range(1, 1 << 20));
  }

  absl::StatusOr<PlanOptions> Complete() const {
    PlanOptions plan = options;
    plan.json = format == "json";
    DeviceKind kind = {"", 0.0, 0.0, kDeviceKinds[0].all_reduce_us};
    for (const DeviceKind& known : kDeviceKinds) {
      if (plan.device == known.name) kind = known;
    }
    if (plan.memory_gib == 0.0) plan.memory_gib = kind.memory_gib;
    if (plan.bandwidth_gbs == 0.0) plan.bandwidth_gbs = kind.bandwidth_gbs;
    if (plan.all_reduce_us < 0.0) {
      plan.all_reduce_us = kind.all_reduce_us * (plan.devices > kDevicesOfHost ? kHostsFactor : 1.0);
    }
    const char* const missing = plan.memory_gib == 0.0      ? "--plan-memory-gib"
                                : plan.bandwidth_gbs == 0.0 ? "--plan-bandwidth-gbs"
                                                            : nullptr;
    if (missing == nullptr) return plan;
    return absl::InvalidArgumentError(plan.device.empty()
                                          ? absl::StrCat("--plan needs --plan-device or ", missing)
                                          : absl::StrCat("--plan-device ", plan.device, " needs ", missing));
  }
};

// The one user of CLI11; its exceptions end here. INVALID_ARGUMENT is a usage error.
absl::StatusOr<Flags> ParseFlags(int argc, const char* const* argv) {
  Flags flags;
  CLI::App app;
  app.set_help_flag();
  app.add_option("--config", flags.config_path);
  app.add_flag("--check-config", flags.check);
  app.add_flag("--print-config", flags.print);
  app.add_flag("--version", flags.version);
  app.add_flag("-h,--help", flags.help);
  PlanFlags plan;
  plan.AddTo(&app);

  Config scratch;
  const std::vector<Option> options = OptionTable(&scratch);
  std::map<std::string, std::string> texts;
  for (const Option& option : options) {
    const std::string flag = FlagName(option.key);
    std::string& text = texts[option.key];
    CLI::Option* added = option.is_bool()
                             ? app.add_flag(absl::StrCat(flag, "{true},--no-", flag.substr(2), "{false}"), text)
                             : app.add_option(flag, text);
    added->multi_option_policy(CLI::MultiOptionPolicy::Throw);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return absl::InvalidArgumentError(e.what());
  }
  for (const Option& option : options) {
    const std::string flag = FlagName(option.key);
    if (app.count(flag) == 0) continue;
    const absl::Status set = SetOption(option, texts[option.key]);
    if (!set.ok()) return absl::InvalidArgumentError(absl::StrCat(flag, ": ", set.message()));
    flags.values[option.key] = texts[option.key];
  }
  if (!plan.format.empty()) {
    ASSIGN_OR_RETURN(flags.plan, plan.Complete());
  }
  return flags;
}

ParsedCommandLine Exit(int code) { return {code, {}, {}}; }

ParsedCommandLine ExitWith(int code, absl::string_view message) {
  std::fprintf(stderr, "dejavud: %s\n", std::string(message).c_str());
  return Exit(code);
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

ParsedCommandLine ParseCommandLine(int argc, const char* const* argv) {
  absl::StatusOr<Flags> flags = ParseFlags(argc, argv);
  if (!flags.ok()) return ExitWith(kExitUsage, absl::StrCat(flags.status().message(), " (see --help)"));
  if (flags->help) {
    std::fputs(HelpText().c_str(), stdout);
    return Exit(kExitDone);
  }
  if (flags->version) {
    std::puts("dejavud " DEJAVU_VERSION);
    return Exit(kExitDone);
  }
  ConfigSources sources{
      .yaml = {}, .yaml_name = flags->config_path, .environment = ProcessEnvironment(), .flags = flags->values};
  if (sources.yaml_name.empty() && sources.environment.count(kConfigVariable) > 0) {
    sources.yaml_name = sources.environment[kConfigVariable];
  }
  if (!sources.yaml_name.empty()) {
    absl::StatusOr<std::string> text = ReadText(sources.yaml_name);
    if (!text.ok()) return ExitWith(kExitConfiguration, text.status().message());
    sources.yaml = *std::move(text);
  }
  const absl::StatusOr<Config> config = LoadConfig(sources);
  if (!config.ok()) return ExitWith(kExitConfiguration, config.status().message());
  if (flags->print) {
    std::fputs(FormatConfig(*config).c_str(), stdout);
    return Exit(kExitDone);
  }
  if (flags->check) return Exit(kExitDone);
  if (config->engine.model.empty()) {
    return ExitWith(kExitUsage, "no model: give --model DIR, DEJAVUD_MODEL or the key model (see --help)");
  }
  return {std::nullopt, *config, flags->plan};
}

}  // namespace dejavu
