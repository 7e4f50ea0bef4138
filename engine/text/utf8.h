// UTF-8 from strangers: what stands at the start of a byte string. Any thread.
#ifndef ENGINE_TEXT_UTF8_H_
#define ENGINE_TEXT_UTF8_H_

#include <cstddef>

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
Utf8Step FirstUtf8Step(absl::string_view bytes);

}  // namespace dejavu

#endif  // ENGINE_TEXT_UTF8_H_
