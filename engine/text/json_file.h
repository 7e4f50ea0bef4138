// JSON files that came with a checkpoint and are not trusted: what the readers of engine/text share. Any thread.
#ifndef ENGINE_TEXT_JSON_FILE_H_
#define ENGINE_TEXT_JSON_FILE_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace dejavu {

constexpr int64_t kMaxTextFileBytes = 32 << 20;
constexpr int64_t kMaxTokens = 1 << 20;

// INVALID_ARGUMENT for what `file` holds.
absl::Status Malformed(const std::string& file, absl::string_view reason);

// A text from a file, fit for a message: UTF-8 as it is, other bytes by their numbers.
std::string QuotedText(absl::string_view text);

bool FileExists(const std::string& file);

// The file's top-level object. `keys`: its keys as the file has them, which nlohmann::json sorts; may be null.
absl::StatusOr<nlohmann::json> ReadJsonFile(const std::string& file, std::vector<std::string>* keys);

// `object[key]`, or null where there is no such key.
const nlohmann::json& Member(const nlohmann::json& object, absl::string_view key);

}  // namespace dejavu

#endif  // ENGINE_TEXT_JSON_FILE_H_
