#include "server/observe/log_text.h"

#include <cstdint>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/utf8.h"

namespace dejavu {
namespace {

uint32_t CodePoint(absl::string_view character) {
  constexpr uint8_t kLeadBits[] = {0, 0x7F, 0x1F, 0x0F, 0x07};
  uint32_t code = static_cast<uint8_t>(character[0]) & kLeadBits[character.size()];
  for (size_t i = 1; i < character.size(); ++i) code = code << 6 | (static_cast<uint8_t>(character[i]) & 0x3F);
  return code;
}

// Controls, line and paragraph separators, and what changes the direction of the text around it.
bool IsUnsafe(uint32_t code) {
  return code < 0x20 || (code >= 0x7F && code < 0xA0) || code == 0x061C || code == 0x200E || code == 0x200F ||
         (code >= 0x2028 && code <= 0x202E) || (code >= 0x2066 && code <= 0x2069) || code == 0xFEFF;
}

}  // namespace

std::string EscapedForText(absl::string_view text, bool quoted) {
  std::string escaped;
  escaped.reserve(text.size());
  while (!text.empty()) {
    const Utf8Step step = FirstUtf8Step(text);
    const absl::string_view character = text.substr(0, step.length);
    text.remove_prefix(step.length);
    const bool unsafe = step.kind != Utf8Kind::kWhole || IsUnsafe(CodePoint(character));
    if (character == "\n") {
      escaped += "\\n";
    } else if (unsafe) {
      for (const char byte : character) absl::StrAppendFormat(&escaped, "\\x%02x", static_cast<uint8_t>(byte));
    } else {
      if (quoted && (character == "\"" || character == "\\")) escaped += '\\';
      absl::StrAppend(&escaped, character);
    }
  }
  return escaped;
}

std::string JsonString(absl::string_view text) {
  std::string json = "\"";
  json.reserve(text.size() + 2);
  while (!text.empty()) {
    const Utf8Step step = FirstUtf8Step(text);
    const absl::string_view character = text.substr(0, step.length);
    text.remove_prefix(step.length);
    if (step.kind != Utf8Kind::kWhole) {
      json += "\\ufffd";
    } else if (character == "\"" || character == "\\") {
      absl::StrAppend(&json, "\\", character);
    } else if (const uint32_t code = CodePoint(character); IsUnsafe(code)) {  // none is above U+FFFF
      absl::StrAppendFormat(&json, "\\u%04x", code);
    } else {
      absl::StrAppend(&json, character);
    }
  }
  json += '"';
  return json;
}

}  // namespace dejavu
