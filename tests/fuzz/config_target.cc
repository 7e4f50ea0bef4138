// The configuration: a file, the environment and flags, which when accepted can be written out and read back; and the
// command line as the process gets it.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "config/command_line.h"
#include "config/config.h"
#include "config/option.h"
#include "config/option_table.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

// Lines of name=value.
std::map<std::string, std::string> Pairs(absl::string_view text) {
  std::map<std::string, std::string> pairs;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::pair<absl::string_view, absl::string_view> pair = absl::StrSplit(line, absl::MaxSplits('=', 1));
    if (!pair.first.empty()) pairs.emplace(pair.first, pair.second);
  }
  return pairs;
}

void CheckOptionsHold(Config config) {
  for (const Option& option : OptionTable(&config)) {
    const absl::Status status = SetOption(option, OptionText(option));
    CHECK(status.ok()) << "accepted, and then: " << status;
  }
}

void RunYaml(absl::string_view bytes) {
  FuzzInput input(bytes);
  ConfigSources sources;
  sources.yaml = std::string(input.Section());
  sources.yaml_name = "fuzz.yaml";
  sources.environment = Pairs(input.Section());
  sources.flags = Pairs(input.Section());
  const absl::StatusOr<Config> config = LoadConfig(sources);
  if (!config.ok()) {
    CHECK(absl::IsInvalidArgument(config.status())) << config.status();
    CHECK(!config.status().message().empty()) << "a refusal without a reason";
    // A line for each error, and each of bounded length.
    CHECK(config.status().message().size() <= 4096 + 100 * bytes.size()) << config.status().message().size();
    return;
  }
  CheckOptionsHold(*config);
  const std::string text = FormatConfig(*config);
  ConfigSources written;
  written.yaml = text;
  written.yaml_name = "written.yaml";
  const absl::StatusOr<Config> again = LoadConfig(written);
  CHECK(again.ok()) << again.status();
  CHECK(FormatConfig(*again) == text) << text;
}

// What is written to stdout and stderr while it lives goes nowhere.
class Silence {
 public:
  Silence() {
    static const int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
    for (const int fd : {1, 2}) {
      saved_[fd - 1] = fcntl(fd, F_DUPFD_CLOEXEC, 3);
      dup2(nowhere, fd);
    }
  }
  ~Silence() {
    std::fflush(stdout);
    for (const int fd : {1, 2}) {
      dup2(saved_[fd - 1], fd);
      close(saved_[fd - 1]);
    }
  }
  Silence(const Silence&) = delete;
  Silence& operator=(const Silence&) = delete;

 private:
  int saved_[2];
};

// A configuration file and one argument per line; the line @ is the file's path.
void RunCommandLine(absl::string_view bytes) {
  static const FuzzFiles& files = *new FuzzFiles;
  FuzzInput input(bytes);
  std::vector<std::string> arguments = {"dejavud"};
  for (const absl::string_view line : absl::StrSplit(input.Section(), '\n')) {
    // No path but the file's: what else lies on this machine is no part of the input.
    if (absl::StrContains(line, '/')) continue;
    arguments.emplace_back(line);
  }
  const std::string path = files.Write("fuzz.yaml", input.Rest());
  std::vector<const char*> argv;
  for (std::string& argument : arguments) {
    if (argument == "@") argument = path;
    argv.push_back(argument.c_str());
  }
  const Silence silence;
  const ParsedCommandLine parsed = ParseCommandLine(static_cast<int>(argv.size()), argv.data());
  if (parsed.exit_code.has_value()) {
    CHECK(*parsed.exit_code >= 0 && *parsed.exit_code <= 2) << *parsed.exit_code;
  } else {
    CHECK(!parsed.config.engine.model.empty()) << "a daemon without a model";
    CheckOptionsHold(parsed.config);
  }
}

}  // namespace

FuzzTarget YamlTarget() {
  const std::string yaml =
      "version: 1\nmodel: deploy\nkv:\n  block_tokens: 32\n  dtype: fp32\nscheduler: {max_batch: 4}\n"
      "tls.reload_s: 1.5\nsparsity:\n  default_tier: \"exact\"\n";
  return {"yaml",
          4096,
          RunYaml,
          {yaml,
           absl::StrCat(yaml, "\x1e", "DEJAVUD_KV_BLOCK_TOKENS=8\nDEJAVUD_CONFIG=x", "\x1e",
                        "listen=[::1]:0\nlog.access=false"),
           "# nothing\n", "a: &x [1, 2]\nb: *x\n", "listen: |\n  127.0.0.1:0\n", "? kv\n: {}\n",
           "%YAML 1.2\n---\nmodel: x\n...\n", "scheduler:\n  tenant_weights: a=1,b=2.5\n",
           "metrics:\n  edges: \"ttft_seconds=1,2\"\n"},
          {"version: 1\n",
           "kv:\n",
           "  ",
           "block_tokens: ",
           "scheduler:",
           "tenant_weights: ",
           "a=1,b=1e9",
           "sparsity:",
           "default_tier: ",
           "balanced",
           "log:",
           "true",
           "1e308",
           "-0",
           "0x10",
           "nan",
           ".inf",
           "&a ",
           "*a",
           "!!str ",
           "|\n",
           ">-\n",
           "---\n",
           "...\n",
           "{",
           "}",
           "[",
           "]",
           "? ",
           "- ",
           "'",
           "\"",
           "\\x00",
           "\\u2028",
           "#",
           "\x1e",
           "=",
           "%TAG ! x\n",
           "<<: ",
           "~",
           "\t",
           "\xEF\xBB\xBF",
           "\xC2\x85"}};
}

FuzzTarget CommandLineTarget() {
  return {"command_line",
          1024,
          RunCommandLine,
          {"--model\nbooks\n--kv-block-tokens\n8\n--no-log-access",
           "--config\n@\n--print-config\x1e"
           "model: x\nkv: {block_tokens: 8}\n",
           "--help", "--version", "--check-config\n--model=x\n--scheduler-max-batch=7\n--listen=[::1]:0",
           "--plan\njson\n--model\nsynthetic:opt-125m\n--plan-device\nh100", "--model\na\n--model\nb"},
          {"--model\n",
           "--config\n@\n",
           "--plan\n",
           "--plan-device\n",
           "json",
           "table",
           "--no-log-access\n",
           "--",
           "-h\n",
           "=",
           "\n",
           "true",
           "false",
           "--kv-block-tokens\n",
           "--scheduler-max-batch=",
           "1e999",
           "-1",
           "[",
           "]",
           "\x1e",
           "{",
           "}",
           "'",
           "\"",
           "--tls-cert\n",
           "--trace-sample-ratio=",
           "nan",
           "@"}};
}

}  // namespace dejavu
