#include "config/command_line.h"

#include <unistd.h>

#include <cstdio>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "config/help_text.h"
#include "config/option_table.h"
#include "config/plan_flags.h"
#include "config/yaml_reader.h"
#include "kernels/base/regular_file.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int kExitDone = 0;
constexpr int kExitConfiguration = 1;
constexpr int kExitUsage = 2;

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

struct Flags {
  std::string config_path;
  bool check = false, print = false, version = false, verbose = false, help = false;
  std::optional<PlanOptions> plan;
  std::map<std::string, std::string> values;  // by key
};

// CLI11's exceptions end here. INVALID_ARGUMENT is a usage error.
absl::StatusOr<Flags> ParseFlags(int argc, const char* const* argv) {
  Flags flags;
  CLI::App app;
  app.set_help_flag();
  app.add_option("--config", flags.config_path);
  app.add_flag("--check-config", flags.check);
  app.add_flag("--print-config", flags.print);
  CLI::Option* const version = app.add_flag("--version", flags.version);
  app.add_flag("--verbose", flags.verbose)->needs(version);
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

ParsedCommandLine Exit(int code) { return {code, {}, {}, false}; }

ParsedCommandLine ExitWith(int code, absl::string_view message) {
  std::fprintf(stderr, "dejavud: %s\n", std::string(message).c_str());
  return Exit(code);
}

}  // namespace

ParsedCommandLine ParseCommandLine(int argc, const char* const* argv) {
  absl::StatusOr<Flags> flags = ParseFlags(argc, argv);
  if (!flags.ok()) return ExitWith(kExitUsage, absl::StrCat(flags.status().message(), " (see --help)"));
  if (flags->help) {
    std::fputs(HelpText().c_str(), stdout);
    return Exit(kExitDone);
  }
  if (flags->version) {
    std::puts("dejavud " DEJAVU_VERSION);
    if (flags->verbose) return {std::nullopt, {}, {}, /*describe_build=*/true};
    return Exit(kExitDone);
  }
  ConfigSources sources{
      .yaml = {}, .yaml_name = flags->config_path, .environment = ProcessEnvironment(), .flags = flags->values};
  if (sources.yaml_name.empty() && sources.environment.count(kConfigVariable) > 0) {
    sources.yaml_name = sources.environment[kConfigVariable];
  }
  if (!sources.yaml_name.empty()) {
    absl::StatusOr<std::string> text = ReadRegularFile(sources.yaml_name, kMaxYamlBytes);
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
  return {std::nullopt, *config, flags->plan, false};
}

}  // namespace dejavu
