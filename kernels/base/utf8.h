// Whether bytes are well-formed UTF-8 (RFC 3629: shortest forms only, no surrogates, at most U+10FFFF).
#ifndef KERNELS_BASE_UTF8_H_
#define KERNELS_BASE_UTF8_H_

#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"

namespace dejavu {

// The offset of the first byte that does not belong to a whole character; `bytes.size()` when all do.
inline size_t ValidUtf8Prefix(absl::string_view bytes) {
  size_t at = 0;
  while (at < bytes.size()) {
    const auto lead = static_cast<uint8_t>(bytes[at]);
    const size_t length = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
    if (length == 0 || at + length > bytes.size()) return at;
    for (size_t i = 1; i < length; ++i) {
      // Only the second byte has narrower bounds: they exclude overlong forms, surrogates and what lies above U+10FFFF.
      const uint8_t low = i > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
      const uint8_t high = i > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
      const auto byte = static_cast<uint8_t>(bytes[at + i]);
      if (byte < low || byte > high) return at;
    }
    at += length;
  }
  return at;
}

inline bool IsValidUtf8(absl::string_view bytes) { return ValidUtf8Prefix(bytes) == bytes.size(); }

}  // namespace dejavu

#endif  // KERNELS_BASE_UTF8_H_
