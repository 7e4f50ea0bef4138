#include "server/observe/log_fields.h"

#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"
#include "kernels/base/utf8.h"
#include "nlohmann/json.hpp"
#include "server/observe/log_text.h"

namespace dejavu {
namespace {

// All bytes, pairs of them, and what is special in Unicode.
std::vector<std::string> HostileTexts() {
  std::vector<std::string> texts = {
      "",     "\xE2\x80\xAE",  "\xC2\x85",    "\xE2\x80\xA8",     "\xED\xA0\x80", "\xF4\x90\x80\x80",
      "\xC3", "a\"b\\c\nd\te", "\x1b[31mred", "\xF0\x9F\x98\x80", "\xC3\xA9"};
  for (int a = 0; a < 256; ++a) {
    texts.push_back({static_cast<char>(a)});
    for (const char b : {'"', '\\', '\n', '\x80', '\xBF', 'u'}) texts.push_back({static_cast<char>(a), b});
  }
  return texts;
}

TEST(JsonString, IsJsonForAnyBytes) {
  for (const std::string& text : HostileTexts()) {
    const std::string json = JsonString(text);
    const nlohmann::json parsed = nlohmann::json::parse(json, nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(parsed.is_string()) << absl::CHexEscape(text);
    if (IsValidUtf8(text)) {
      EXPECT_EQ(parsed.get<std::string>(), text);
    }
    for (const char c : json) EXPECT_FALSE(static_cast<uint8_t>(c) < 0x20 || c == 0x7F) << absl::CHexEscape(text);
  }
  EXPECT_EQ(JsonString("\xC3(\xC2\x85\xE2\x80\xAE"), "\"\\ufffd(\\u0085\\u202e\"");
  EXPECT_EQ(JsonString("\xC3\xA9"), "\"\xC3\xA9\"");
}

TEST(EscapedForText, LeavesNothingThatEndsALineOrCommandsATerminal) {
  for (const std::string& text : HostileTexts()) {
    const std::string escaped = EscapedForText(text, /*quoted=*/true);
    EXPECT_TRUE(IsValidUtf8(escaped)) << absl::CHexEscape(text);
    for (const char c : escaped) EXPECT_FALSE(static_cast<uint8_t>(c) < 0x20 || c == 0x7F) << absl::CHexEscape(text);
  }
  EXPECT_EQ(EscapedForText("a\nb\x1b[0m\xFF\xC2\x85", false), "a\\nb\\x1b[0m\\xff\\xc2\\x85");
  EXPECT_EQ(EscapedForText("say \"\\\"", true), "say \\\"\\\\\\\"");
  EXPECT_EQ(EscapedForText("say \"\\\"", false), "say \"\\\"");
}

TEST(LogFields, QuotesWhatIsNotPlain) {
  LogFields text(LogFormat::kText);
  text.Text("id", "req-1.a:b").Text("tenant", "a b=c").Text("empty", "").Count("n", -3).Number("ms", 1.23456, 3);
  text.Number("nan", std::nan(""), 3);
  EXPECT_EQ(text.text(), "id=req-1.a:b tenant=\"a b=c\" empty=\"\" n=-3 ms=1.235");
  LogFields json(LogFormat::kJson);
  json.Text("id", "a\n").Count("n", 3).Number("ms", 1.5, 3);
  EXPECT_EQ(json.text(), "\"id\":\"a\\u000a\",\"n\":3,\"ms\":1.500");
}

}  // namespace
}  // namespace dejavu
