#include "kernels/base/utf8.h"

#include <string>

#include "gtest/gtest.h"

namespace dejavu {
namespace {

std::string Encoded(uint32_t code) {  // without any check
  if (code < 0x80) return {static_cast<char>(code)};
  if (code < 0x800) return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
  const char last = static_cast<char>(0x80 | (code & 0x3F)), middle = static_cast<char>(0x80 | (code >> 6 & 0x3F));
  if (code < 0x10000) return {static_cast<char>(0xE0 | code >> 12), middle, last};
  return {static_cast<char>(0xF0 | code >> 18), static_cast<char>(0x80 | (code >> 12 & 0x3F)), middle, last};
}

TEST(Utf8, EveryCodePointIsValidButSurrogatesAndWhatLiesBeyondTheLast) {
  for (uint32_t code = 0; code < 0x120000; ++code) {
    const bool valid = code <= 0x10FFFF && (code < 0xD800 || code > 0xDFFF);
    ASSERT_EQ(IsValidUtf8(Encoded(code)), valid) << code;
  }
}

TEST(Utf8, OverlongFormsAreInvalid) {
  for (const char* bytes :
       {"\xC0\x80", "\xC1\xBF", "\xE0\x80\x80", "\xE0\x9F\xBF", "\xF0\x80\x80\x80", "\xF0\x8F\xBF\xBF"}) {
    EXPECT_FALSE(IsValidUtf8(bytes)) << bytes;
  }
}

TEST(Utf8, TellsWhereTheFirstBadByteStands) {
  EXPECT_EQ(ValidUtf8Prefix(""), 0u);
  EXPECT_EQ(ValidUtf8Prefix("h\xC3\xA9"), 3u);
  EXPECT_EQ(ValidUtf8Prefix("h\xC3\xA9\xC3"), 3u);
  EXPECT_EQ(ValidUtf8Prefix("ab\x80"), 2u);
  EXPECT_EQ(ValidUtf8Prefix("\xE2\x82\xAC\xE2\x82"), 3u);
  EXPECT_EQ(ValidUtf8Prefix("\xFFz"), 0u);
  EXPECT_EQ(ValidUtf8Prefix("\xE2z"), 0u);
}

}  // namespace
}  // namespace dejavu
