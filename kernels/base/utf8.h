// UTF-8 from strangers (RFC 3629: shortest forms only, no surrogates, at most U+10FFFF). Header only, because the
// client and the configuration check text too and link no kernels. Any thread.
#ifndef KERNELS_BASE_UTF8_H_
#define KERNELS_BASE_UTF8_H_

#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"

namespace dejavu {

constexpr char kReplacementCharacter[] = "\xEF\xBF\xBD";  // U+FFFD

enum class Utf8Kind {
  kWhole,       // one character
  kIncomplete,  // all of the bytes; more bytes may complete the character
  kIllFormed,   // a maximal subpart that no further byte can complete
};

struct Utf8Step {
  Utf8Kind kind;
  size_t length;  // in bytes, at least 1
};

// Classifies the beginning of `bytes`, which is not empty, by Unicode 15 table 3-7.
inline Utf8Step FirstUtf8Step(absl::string_view bytes) {
  const auto lead = static_cast<uint8_t>(bytes[0]);
  const size_t length = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
  if (length == 0) return {Utf8Kind::kIllFormed, 1};
  for (size_t i = 1; i < length; ++i) {
    if (i == bytes.size()) return {Utf8Kind::kIncomplete, i};
    // Only the second byte has narrower bounds: they exclude overlong forms, surrogates and what lies above U+10FFFF.
    const uint8_t low = i > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = i > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    const auto byte = static_cast<uint8_t>(bytes[i]);
    if (byte < low || byte > high) return {Utf8Kind::kIllFormed, i};
  }
  return {Utf8Kind::kWhole, length};
}

// The offset of the first byte that does not belong to a whole character; `bytes.size()` when all do.
inline size_t ValidUtf8Prefix(absl::string_view bytes) {
  size_t at = 0;
  while (at < bytes.size()) {
    const Utf8Step step = FirstUtf8Step(bytes.substr(at));
    if (step.kind != Utf8Kind::kWhole) return at;
    at += step.length;
  }
  return at;
}

inline bool IsValidUtf8(absl::string_view bytes) { return ValidUtf8Prefix(bytes) == bytes.size(); }

}  // namespace dejavu

#endif  // KERNELS_BASE_UTF8_H_
