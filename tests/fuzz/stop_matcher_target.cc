// StopMatcher against a search that looks at everything again after each byte.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "engine/text/stop_matcher.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

struct Found {
  int stop = -1;
  size_t end = 0;  // of the text that was looked at
};

// The stop string that ends first behind `barred` bytes; of several that end there the longest, of equal ones the
// first.
Found Search(const std::vector<std::string>& stops, const std::string& text, size_t barred) {
  for (size_t end = barred + 1; end <= text.size(); ++end) {
    int found = -1;
    for (size_t i = 0; i < stops.size(); ++i) {
      const bool here = absl::EndsWith(absl::string_view(text).substr(0, end), stops[i]);
      if (here && (found < 0 || stops[i].size() > stops[found].size())) found = static_cast<int>(i);
    }
    if (found >= 0) return {found, end};
  }
  return {-1, text.size()};
}

// How much of the end of `text` may still become a stop string.
size_t Undecided(const std::vector<std::string>& stops, absl::string_view text) {
  size_t longest = 0;
  for (const std::string& stop : stops) {
    for (size_t bytes = longest + 1; bytes < stop.size() && bytes <= text.size(); ++bytes) {
      if (absl::EndsWith(text, absl::string_view(stop).substr(0, bytes))) longest = bytes;
    }
  }
  return longest;
}

void Run(absl::string_view bytes) {
  FuzzInput input(bytes);
  const uint8_t kind = input.Byte();
  const bool include = (kind & 1) != 0, few_letters = (kind & 2) != 0;
  const size_t barred_pieces = kind >> 2 & 7;
  const auto letters = [&](absl::string_view raw) {
    std::string text(raw);
    if (few_letters) {
      for (char& c : text) c = static_cast<char>('a' + (static_cast<uint8_t>(c) & 1));
    }
    return text;
  };
  std::vector<std::string> stops;
  for (uint32_t i = 0, count = 1 + input.Below(8); i < count; ++i) {
    const std::string stop = letters(input.Take(1 + input.Below(24)));
    if (!stop.empty()) stops.push_back(stop);
  }
  const std::string cuts(input.Take(input.Below(32)));
  const std::string text = letters(input.Rest());
  const auto length_of = [&](size_t piece) {
    const size_t length = cuts.empty() ? text.size() : static_cast<uint8_t>(cuts[piece % cuts.size()]) % 9;
    return std::max<size_t>(length, 1);
  };
  size_t barred = 0;
  for (size_t piece = 0; piece < barred_pieces; ++piece) barred = std::min(text.size(), barred + length_of(piece));
  const Found wanted = Search(stops, text, barred);

  StopMatcher matcher(stops, include);
  std::string out;
  int found = -1;
  size_t at = 0;
  for (size_t piece = 0; at < text.size() && found < 0; ++piece) {
    const absl::string_view part = absl::string_view(text).substr(at, length_of(piece));
    at += part.size();
    found = matcher.Append(part, /*may_end=*/piece >= barred_pieces, &out);
    if (found < 0) {
      const absl::string_view seen = absl::string_view(text).substr(0, at);
      CHECK(out == seen.substr(0, at - Undecided(stops, seen))) << out.size() << " bytes came out of " << at;
    }
  }
  if (found < 0) matcher.Flush(&out);
  CHECK(found == wanted.stop) << "stop " << found << ", not " << wanted.stop;
  const size_t kept = found < 0 || include ? wanted.end : wanted.end - stops[found].size();
  CHECK(out == text.substr(0, kept)) << out.size() << " bytes came out, not " << kept;
}

}  // namespace

FuzzTarget StopMatcherTarget() {
  const std::string zero(1, '\0');
  return {"stop_matcher",
          512,
          Run,
          {zero + zero + zero + "\n" + zero + "a line\nand another",
           Raw("\x01\x02\x03stop\x04Human\x01\n\n\x02\x01\x03") + "so it went on. Hum, said he. Human: stop",
           Raw("\x03\x02\x04\x01\x01\x01\x01\x01\x02\x01\x01\x01\x01\x01\x00\x01\x01\x01") +
               Raw("\x02\x01\x02\x01\x00\x00\x01\x00\x01\x01\x01\x00\x01\x01\x01\x01"),
           Raw("\x0a\x02\x04\x01\x01\x01\x01\x01\x02\x01\x01\x01\x01\x01\x00\x01\x01\x01") +
               Raw("\x02\x01\x02\x01\x00\x00\x01\x00\x01\x01\x01\x00\x01\x01\x01\x01"),
           Raw("\x02\x07\x01\x00\x01\x01\x01\x02\x01\x01\x00\x02\x02\x01\x01\x01") + "abaababbabaabbab"},
          {"\n\n", "ab", "aab", "aaaa", "abab"}};
}

}  // namespace dejavu
