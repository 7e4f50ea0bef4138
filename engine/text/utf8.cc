#include "engine/text/utf8.h"

#include <cstdint>

namespace dejavu {
namespace {

// What a lead byte promises: the length of the character, and the range of its second byte.
struct Lead {
  size_t length;  // 0: no character begins with this byte
  uint8_t low = 0x80;
  uint8_t high = 0xBF;
};

Lead ReadLead(uint8_t byte) {
  if (byte < 0x80) return {1};
  if (byte < 0xC2) return {0};
  if (byte < 0xE0) return {2};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};  // not overlong
  if (byte == 0xED) return {3, 0x80, 0x9F};  // not a surrogate
  if (byte < 0xF0) return {3};
  if (byte == 0xF0) return {4, 0x90, 0xBF};  // not overlong
  if (byte < 0xF4) return {4};
  if (byte == 0xF4) return {4, 0x80, 0x8F};  // not beyond U+10FFFF
  return {0};
}

}  // namespace

Utf8Step FirstUtf8Step(absl::string_view bytes) {
  Lead lead = ReadLead(static_cast<uint8_t>(bytes[0]));
  if (lead.length == 0) return {Utf8Kind::kIllFormed, 1};
  for (size_t i = 1; i < lead.length; ++i) {
    if (i == bytes.size()) return {Utf8Kind::kIncomplete, i};
    const uint8_t byte = static_cast<uint8_t>(bytes[i]);
    if (byte < lead.low || byte > lead.high) return {Utf8Kind::kIllFormed, i};
    lead.low = 0x80;
    lead.high = 0xBF;
  }
  return {Utf8Kind::kWhole, lead.length};
}

}  // namespace dejavu
