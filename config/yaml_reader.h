// A YAML file as a flat list of keys with their places, for a configuration: one document, mappings of scalars, nothing
// that can refer, repeat or grow (anchors, aliases, tags, several documents).
#ifndef CONFIG_YAML_READER_H_
#define CONFIG_YAML_READER_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace dejavu {

constexpr size_t kMaxYamlBytes = 1 << 20;

struct YamlEntry {
  enum Kind { kPlain, kQuoted, kNull, kMapping, kSequence };

  std::string path;  // "kv.block_tokens"; a mapping comes before its keys
  Kind kind = kNull;
  std::string value;                   // of a scalar
  std::string key_place, value_place;  // "dejavud.yaml:3:5"
};

// INVALID_ARGUMENT with name:line:column for what is not such a file, and for a key that the file has twice.
absl::StatusOr<std::vector<YamlEntry>> ReadYaml(const std::string& text, const std::string& name);

}  // namespace dejavu

#endif  // CONFIG_YAML_READER_H_
