// JSON from files that are not trusted: duplicate keys, deep nesting and floods of values are errors, where
// nlohmann::json alone would keep the last key and take the memory. Any thread.
#ifndef ENGINE_FORMATS_JSON_TEXT_H_
#define ENGINE_FORMATS_JSON_TEXT_H_

#include <string>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace dejavu {

// What Python's json writes and reads beyond JSON: NaN, Infinity and -Infinity. Here they become strings of those
// names, which no number is taken for.
enum class JsonDialect { kStrict, kPython };

// The object that `text` holds. INVALID_ARGUMENT with `source` (a file's path) when it is anything else.
absl::StatusOr<nlohmann::json> ParseJsonObject(const std::string& text, const std::string& source,
                                               JsonDialect dialect = JsonDialect::kStrict);

}  // namespace dejavu

#endif  // ENGINE_FORMATS_JSON_TEXT_H_
