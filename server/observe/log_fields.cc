#include "server/observe/log_fields.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/observe/log_text.h"

namespace dejavu {
namespace {

bool IsPlain(absl::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           absl::string_view("._:/[]+-").find(c) != absl::string_view::npos;
  });
}

}  // namespace

LogFields& LogFields::Text(absl::string_view key, absl::string_view value) {
  Key(key);
  if (format_ == LogFormat::kJson) {
    text_ += JsonString(value);
  } else if (IsPlain(value)) {
    absl::StrAppend(&text_, value);
  } else {
    absl::StrAppend(&text_, "\"", EscapedForText(value, /*quoted=*/true), "\"");
  }
  return *this;
}

LogFields& LogFields::Count(absl::string_view key, int64_t value) {
  Key(key);
  absl::StrAppend(&text_, value);
  return *this;
}

LogFields& LogFields::Unsigned(absl::string_view key, uint64_t value) {
  Key(key);
  absl::StrAppend(&text_, value);
  return *this;
}

LogFields& LogFields::Number(absl::string_view key, double value, int decimals) {
  if (!std::isfinite(value)) return *this;
  Key(key);
  absl::StrAppendFormat(&text_, "%.*f", decimals, value);
  return *this;
}

void LogFields::Key(absl::string_view key) {
  if (format_ == LogFormat::kJson) {
    absl::StrAppend(&text_, text_.empty() ? "\"" : ",\"", key, "\":");
  } else {
    absl::StrAppend(&text_, text_.empty() ? "" : " ", key, "=");
  }
}

}  // namespace dejavu
