#include "engine/text/json_file.h"

#include <algorithm>
#include <filesystem>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/regular_file.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"

namespace dejavu {
namespace {

using nlohmann::json;

constexpr int kMaxJsonDepth = 32;  // the deepest real file has 6

bool NestsTooDeep(absl::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string && c == '\\') {
      ++i;
    } else if (c == '"') {
      in_string = !in_string;
    } else if (!in_string && (c == '{' || c == '[')) {
      if (++depth > kMaxJsonDepth) return true;
    } else if (!in_string && (c == '}' || c == ']')) {
      --depth;
    }
  }
  return false;
}

// `keys` may name one twice: then the last value counts, and the first place.
json ParseNotingKeys(const std::string& text, std::vector<std::string>* keys) {
  return json::parse(text, [keys](int depth, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::key && depth == 1) keys->push_back(parsed.get<std::string>());
    return true;
  });
}

}  // namespace

absl::Status Malformed(const std::string& file, absl::string_view reason) {
  return absl::InvalidArgumentError(absl::StrCat(file, ": ", reason));
}

std::string QuotedText(absl::string_view text) {
  constexpr size_t kMaxBytes = 80;
  const absl::string_view start = text.substr(0, kMaxBytes), whole = start.substr(0, ValidUtf8Prefix(start));
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(whole), absl::CHexEscape(start.substr(whole.size())),
                      text.size() > kMaxBytes ? "..." : "", "\"");
}

bool FileExists(const std::string& file) {
  std::error_code error;
  return std::filesystem::exists(file, error);
}

absl::StatusOr<json> ReadJsonFile(const std::string& file, std::vector<std::string>* keys) {
  ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(file, kMaxTextFileBytes));
  // nlohmann::json would pass over it, and no other reader does.
  if (absl::StartsWith(text, "\xEF\xBB\xBF")) return Malformed(file, "begins with a byte order mark");
  // Before parsing: a nest of 32 million arrays takes gigabytes.
  if (NestsTooDeep(text)) return Malformed(file, absl::StrCat("JSON is nested deeper than ", kMaxJsonDepth, " levels"));
  try {
    json value = keys == nullptr ? json::parse(text) : ParseNotingKeys(text, keys);
    if (!value.is_object()) return Malformed(file, "is not a JSON object");
    return value;
  } catch (const json::parse_error& error) {
    return Malformed(file, absl::StrCat("is not JSON: error at byte ", error.byte));
  } catch (const json::exception& error) {
    return Malformed(file, absl::StrCat("is not JSON: ", QuotedText(error.what())));
  }
}

const json& Member(const json& object, absl::string_view key) {
  static const json null;
  const auto entry = object.find(key);
  return entry == object.end() ? null : *entry;
}

}  // namespace dejavu
