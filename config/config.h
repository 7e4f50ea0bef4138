// Config: everything that dejavud can be told, from flags, environment and one YAML file. Each key of option_table.cc
// (`kv.block_tokens`) is also a flag (`--kv-block-tokens`) and an environment variable (`DEJAVUD_KV_BLOCK_TOKENS`); a
// flag wins over the environment, which wins over the file, which wins over the default. Read once, at start, by one
// thread.
#ifndef CONFIG_CONFIG_H_
#define CONFIG_CONFIG_H_

#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "engine/options.h"
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

inline constexpr char kConfigVariable[] = "DEJAVUD_CONFIG";  // beside the keys: the path of the file

// INVALID_ARGUMENT with one line per error. An error in the file begins with name:line:column.
absl::StatusOr<Config> LoadConfig(const ConfigSources& sources);

// As YAML, every key with its help; LoadConfig reads it back to the same values. config/dejavud.yaml is this, of the
// defaults.
std::string FormatConfig(const Config& config);

}  // namespace dejavu

#endif  // CONFIG_CONFIG_H_
