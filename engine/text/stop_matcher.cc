// Knuth, Morris and Pratt, once per stop string: each knows the longest of its prefixes that the text ends with. The
// longest of these is what has to be held back. Amortised cost: one step per stop string and byte.
#include "engine/text/stop_matcher.h"

#include <algorithm>
#include <utility>

#include "kernels/base/check.h"

namespace dejavu {

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include) : include_(include) {
  for (std::string& text : stops) {
    CHECK(!text.empty()) << "empty stop string";
    Stop stop;
    stop.text = std::move(text);
    // The string finds its own borders when it is matched against itself from the second byte on.
    stop.borders.assign(stop.text.size(), 0);
    for (size_t i = 1; i < stop.text.size(); ++i) {
      Advance(stop, stop.text[i]);
      stop.borders[i] = stop.matched;
    }
    stop.matched = 0;
    stops_.push_back(std::move(stop));
  }
}

void StopMatcher::Advance(Stop& stop, char c) {
  while (stop.matched > 0 && stop.text[stop.matched] != c) stop.matched = stop.borders[stop.matched - 1];
  if (stop.text[stop.matched] == c) ++stop.matched;
}

int StopMatcher::Append(absl::string_view text, bool may_end, std::string* out) {
  CHECK(!found_) << "text after a stop string";
  const size_t held_before = held_.size();
  held_.append(text.data(), text.size());
  int found = -1;
  size_t certain = 0;  // bytes of held_ that can go
  for (size_t end = held_before; end < held_.size() && found < 0; ++end) {
    size_t longest_prefix = 0;
    for (size_t i = 0; i < stops_.size(); ++i) {
      Stop& stop = stops_[i];
      Advance(stop, held_[end]);
      // One that may not end here goes on as the longest that may end later.
      if (!may_end && stop.matched == stop.text.size()) stop.matched = stop.borders.back();
      const size_t matched = stop.matched;
      longest_prefix = std::max(longest_prefix, matched);
      if (matched == stop.text.size() && (found < 0 || matched > stops_[found].text.size())) {
        found = static_cast<int>(i);
      }
    }
    const size_t kept_back = found < 0 ? longest_prefix : include_ ? 0 : stops_[found].text.size();
    certain = end + 1 - kept_back;
  }
  out->append(held_, 0, certain);
  held_.erase(0, certain);
  if (found >= 0) {
    found_ = true;
    held_.clear();
  }
  return found;
}

void StopMatcher::Flush(std::string* out) {
  out->append(held_);
  held_.clear();
}

}  // namespace dejavu
