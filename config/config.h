// Config: everything that dejavud can be told, from flags, environment and one YAML file. Each key of
// config/option_table.cc
// (`kv.block_tokens`) is also a flag (`--kv-block-tokens`) and an environment variable (`DEJAVUD_KV_BLOCK_TOKENS`); a
// flag wins over the environment, which wins over the file, which wins over the default. Read once, at start, by one
// thread.
#ifndef CONFIG_CONFIG_H_
#define CONFIG_CONFIG_H_

#include <map>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "engine/options.h"
#include "engine/plan_options.h"
#include "server/options.h"

namespace dejavu {

struct Config {
  EngineOptions engine;
  ServerOptions server;
};

struct ConfigSources {
  std::string yaml;                                // the file's content; empty: no file
  std::string yaml_name;                           // as it stands in messages
  std::map<std::string, std::string> environment;  // the variables whose names begin with DEJAVUD_
  std::map<std::string, std::string> flags;        // by key; checked values only
};

// INVALID_ARGUMENT with one line per error. An error in the file begins with name:line:column.
absl::StatusOr<Config> LoadConfig(const ConfigSources& sources);

// As YAML, every key with its help; LoadConfig reads it back to the same values. config/dejavud.yaml is this, of the
// defaults.
std::string FormatConfig(const Config& config);

struct ParsedCommandLine {
  std::optional<int> exit_code;  // set: everything was said; exit with it (0 done, 1 configuration, 2 usage)
  Config config;
  std::optional<PlanOptions> plan;  // set: nothing is to be served, only calculated (--plan)
};

// The daemon's command line, with the process's environment. Prints help, version and errors itself.
ParsedCommandLine ParseCommandLine(int argc, const char* const* argv);

}  // namespace dejavu

#endif  // CONFIG_CONFIG_H_
