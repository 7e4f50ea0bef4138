#include "engine/text/stop_matcher.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace dejavu {
namespace {

TEST(StopMatcher, FindsAStopStringAcrossPieces) {
  StopMatcher matcher({"END"}, /*include=*/false);
  std::string out;
  EXPECT_EQ(matcher.Append("text E", /*may_end=*/true, &out), -1);
  EXPECT_EQ(out, "text ");
  EXPECT_EQ(matcher.Append("N", /*may_end=*/true, &out), -1);
  EXPECT_EQ(out, "text ");
  EXPECT_EQ(matcher.Append("D and more", /*may_end=*/true, &out), 0);
  EXPECT_EQ(out, "text ");
  matcher.Flush(&out);
  EXPECT_EQ(out, "text ");
}

TEST(StopMatcher, KeepsTheStopStringInTheTextWhenAsked) {
  StopMatcher matcher({"END"}, /*include=*/true);
  std::string out;
  EXPECT_EQ(matcher.Append("text E", /*may_end=*/true, &out), -1);
  EXPECT_EQ(matcher.Append("ND and more", /*may_end=*/true, &out), 0);
  EXPECT_EQ(out, "text END");
}

TEST(StopMatcher, LetsHeldTextGoOnceItCannotBeAStopString) {
  StopMatcher matcher({"aab"}, false);
  std::string out;
  EXPECT_EQ(matcher.Append("aa", /*may_end=*/true, &out), -1);
  EXPECT_EQ(out, "");
  EXPECT_EQ(matcher.Append("a", /*may_end=*/true, &out), -1);
  EXPECT_EQ(out, "a");
  EXPECT_EQ(matcher.Append("c", /*may_end=*/true, &out), -1);
  EXPECT_EQ(out, "aaac");
}

TEST(StopMatcher, FlushGivesBackWhatWasHeld) {
  StopMatcher matcher({"a stop string longer than everything that comes"}, false);
  std::string out;
  EXPECT_EQ(matcher.Append("a stop string ", /*may_end=*/true, &out), -1);
  EXPECT_EQ(out, "");
  EXPECT_EQ(matcher.Append("longer", /*may_end=*/true, &out), -1);
  EXPECT_EQ(out, "");
  matcher.Flush(&out);
  EXPECT_EQ(out, "a stop string longer");
}

TEST(StopMatcher, TheStopStringThatEndsFirstWins) {
  StopMatcher matcher({"abcd", "bc"}, false);
  std::string out;
  EXPECT_EQ(matcher.Append("xabcd", /*may_end=*/true, &out), 1);
  EXPECT_EQ(out, "xa");
}

TEST(StopMatcher, OfTwoThatEndTogetherTheLongestWins) {
  StopMatcher matcher({"bc", "abc", "c"}, false);
  std::string out;
  EXPECT_EQ(matcher.Append("xabc", /*may_end=*/true, &out), 1);
  EXPECT_EQ(out, "x");
}

TEST(StopMatcher, WithoutStopStringsNothingIsHeldBack) {
  StopMatcher matcher({}, false);
  std::string out;
  EXPECT_EQ(matcher.Append("text", /*may_end=*/true, &out), -1);
  EXPECT_EQ(out, "text");
}

TEST(StopMatcher, HoldsBackWholeCharacters) {
  StopMatcher matcher({"é!"}, false);
  std::string out;
  EXPECT_EQ(matcher.Append("è", /*may_end=*/true, &out), -1);  // shares its lead byte with é
  EXPECT_EQ(out, "è");
  EXPECT_EQ(matcher.Append("aé", /*may_end=*/true, &out), -1);
  EXPECT_EQ(out, "èa");
  EXPECT_EQ(matcher.Append("!", /*may_end=*/true, &out), 0);
  EXPECT_EQ(out, "èa");
}

TEST(StopMatcher, OneThatMayNotEndYetIsTextAndMayBeginAnother) {
  StopMatcher matcher({"aa"}, false);
  std::string out;
  EXPECT_EQ(matcher.Append("xaa", /*may_end=*/false, &out), -1);
  EXPECT_EQ(out, "xa");
  EXPECT_EQ(matcher.Append("b", /*may_end=*/true, &out), -1);
  EXPECT_EQ(out, "xaab");
  EXPECT_EQ(matcher.Append("a", /*may_end=*/false, &out), -1);
  EXPECT_EQ(matcher.Append("a", /*may_end=*/true, &out), 0);
  EXPECT_EQ(out, "xaab");
}

// What the contract says, looked up the slow way in the whole text so far.
struct NaiveMatch {
  int stop = -1;
  size_t certain = 0;
};

// None ends within the first `barred` bytes.
NaiveMatch NaiveSearch(const std::string& text, const std::vector<std::string>& stops, bool include, size_t barred) {
  NaiveMatch match;
  for (size_t end = barred + 1; end <= text.size(); ++end) {
    for (size_t i = 0; i < stops.size(); ++i) {
      if (end < stops[i].size() || text.compare(end - stops[i].size(), stops[i].size(), stops[i]) != 0) continue;
      if (match.stop < 0 || stops[i].size() > stops[match.stop].size()) match.stop = static_cast<int>(i);
    }
    if (match.stop >= 0) {
      match.certain = include ? end : end - stops[match.stop].size();
      return match;
    }
  }
  size_t held = 0;
  for (const std::string& stop : stops) {
    for (size_t length = 1; length < stop.size() && length <= text.size(); ++length) {
      if (text.compare(text.size() - length, length, stop, 0, length) == 0) held = std::max(held, length);
    }
  }
  match.certain = text.size() - held;
  return match;
}

TEST(StopMatcher, AgreesWithANaiveSearchOnRandomTextsAndSplits) {
  std::mt19937 random(7);
  const auto below = [&random](int limit) { return static_cast<int>(random() % limit); };
  const auto random_text = [&below](int length, int alphabet) {
    std::string text;
    for (int i = 0; i < length; ++i) text.push_back(static_cast<char>('a' + below(alphabet)));
    return text;
  };
  int matches = 0;
  for (int round = 0; round < 20000; ++round) {
    const int alphabet = 1 + below(3);
    std::vector<std::string> stops(below(5));
    for (std::string& stop : stops) stop = random_text(1 + below(7), alphabet);
    const bool include = below(2);
    const int barred_pieces = below(4);
    StopMatcher matcher(stops, include);
    std::string seen, out;
    size_t barred = 0;
    int found = -1;
    for (int piece = 0; piece < 12 && found < 0; ++piece) {
      const std::string text = random_text(below(5), alphabet);
      seen += text;
      if (piece < barred_pieces) barred = seen.size();
      found = matcher.Append(text, /*may_end=*/piece >= barred_pieces, &out);
      const NaiveMatch expected = NaiveSearch(seen, stops, include, barred);
      ASSERT_EQ(found, expected.stop) << seen;
      ASSERT_EQ(out, seen.substr(0, expected.certain)) << seen;
    }
    matches += found >= 0;
    if (found >= 0) continue;
    matcher.Flush(&out);
    ASSERT_EQ(out, seen);
  }
  EXPECT_GT(matches, 1000);
  EXPECT_LT(matches, 19000);
}

TEST(StopMatcher, TakesManySmallPiecesOfAlmostAMatch) {
  std::vector<std::string> stops;
  for (int i = 0; i < 8; ++i) stops.push_back(std::string(255, 'a') + static_cast<char>('b' + i));
  StopMatcher matcher(stops, false);
  std::string out;
  for (int i = 0; i < 200000; ++i) ASSERT_EQ(matcher.Append("a", /*may_end=*/true, &out), -1);
  EXPECT_EQ(out.size(), 200000 - 255);
  EXPECT_EQ(matcher.Append("i", /*may_end=*/true, &out), 7);
  EXPECT_EQ(out.size(), 200000 - 255);
}

}  // namespace
}  // namespace dejavu
