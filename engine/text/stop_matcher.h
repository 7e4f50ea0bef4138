// StopMatcher: finds the first of several stop strings in a text that arrives piece by piece. Text that may still turn
// out to be the beginning of a stop string is held back. One per stream; not thread-safe.
#ifndef ENGINE_TEXT_STOP_MATCHER_H_
#define ENGINE_TEXT_STOP_MATCHER_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace dejavu {

class StopMatcher {
 public:
  // `stops`: non-empty strings. `include`: a found stop string stays in the text.
  StopMatcher(std::vector<std::string> stops, bool include);

  // Adds `text`; appends to `out` what is certain. Returns the index of the stop string that ends first (of several
  // that end at the same byte, the longest), or -1. After a match nothing more may be added. Without `may_end` none may
  // end in this text; one may begin there.
  int Append(absl::string_view text, bool may_end, std::string* out);
  // The end without a match: what was held back is text.
  void Flush(std::string* out);

 private:
  struct Stop {
    std::string text;
    std::vector<size_t> borders;  // [i]: the longest proper prefix of text[0..i] that is also its suffix
    size_t matched = 0;           // the longest prefix that the text so far ends with
  };
  static void Advance(Stop& stop, char c);

  std::vector<Stop> stops_;
  const bool include_;
  bool found_ = false;
  std::string held_;
};

}  // namespace dejavu

#endif  // ENGINE_TEXT_STOP_MATCHER_H_
