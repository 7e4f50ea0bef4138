#include "engine/text/added_tokens.h"

#include <algorithm>
#include <optional>

#include "kernels/base/utf8.h"

namespace dejavu {
namespace {

// What \w means to Hugging Face (Unicode Technical Standard 18, annex C).
constexpr char kWordCharacter[] = R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}])";

// Unicode's White_Space.
constexpr absl::string_view kSpaces[] = {
    "\t",           "\n",           "\v",           "\f",           "\r",           " ",
    "\xC2\x85",     "\xC2\xA0",     "\xE1\x9A\x80", "\xE2\x80\x80", "\xE2\x80\x81", "\xE2\x80\x82",
    "\xE2\x80\x83", "\xE2\x80\x84", "\xE2\x80\x85", "\xE2\x80\x86", "\xE2\x80\x87", "\xE2\x80\x88",
    "\xE2\x80\x89", "\xE2\x80\x8A", "\xE2\x80\xA8", "\xE2\x80\xA9", "\xE2\x80\xAF", "\xE2\x81\x9F",
    "\xE3\x80\x80"};

bool IsSpace(absl::string_view character) {
  return std::find(std::begin(kSpaces), std::end(kSpaces), character) != std::end(kSpaces);
}

// The beginning of the character that ends at `end`.
size_t CharacterBefore(absl::string_view text, size_t end) {
  do --end;
  while (end > 0 && (text[end] & 0xC0) == 0x80);
  return end;
}

size_t SkipSpacesBack(absl::string_view text, size_t from, size_t least) {
  while (from > least) {
    const size_t begin = CharacterBefore(text, from);
    if (!IsSpace(text.substr(begin, from - begin))) break;
    from = begin;
  }
  return std::max(from, least);
}

size_t SkipSpaces(absl::string_view text, size_t from) {
  while (from < text.size()) {
    const size_t length = FirstUtf8Step(text.substr(from)).length;
    if (!IsSpace(text.substr(from, length))) break;
    from += length;
  }
  return from;
}

}  // namespace

int32_t AddedTokens::Finder::Child(int32_t node, uint8_t byte) const {
  if (node == 0) return of_root_[byte] != 0 ? of_root_[byte] : -1;
  const auto child = children_.find(static_cast<uint64_t>(node) << 8 | byte);
  return child == children_.end() ? -1 : child->second;
}

void AddedTokens::Finder::Add(const AddedToken& token) {
  int32_t node = 0;
  for (size_t i = token.content.size(); i-- > 0;) {
    const auto byte = static_cast<uint8_t>(token.content[i]);
    int32_t child = Child(node, byte);
    if (child < 0) {
      child = static_cast<int32_t>(nodes_.size());
      nodes_.push_back({.depth = nodes_[node].depth + 1});
      if (node == 0) {
        of_root_[byte] = child;
      } else {
        children_[static_cast<uint64_t>(node) << 8 | byte] = child;
      }
    }
    node = child;
  }
  if (nodes_[node].longest >= 0) return;  // one of the same content is there
  nodes_[node].longest = static_cast<int32_t>(tokens_.size());
  tokens_.push_back(token);
  has_ordinary_ = has_ordinary_ || !token.special;
}

// By depth, so that a node's failure is complete before the node.
void AddedTokens::Finder::Build() {
  struct Edge {
    int32_t parent, child;
    uint8_t byte;
  };
  std::vector<Edge> edges;
  for (int byte = 0; byte < 256; ++byte) {
    if (of_root_[byte] != 0) edges.push_back({0, of_root_[byte], static_cast<uint8_t>(byte)});
  }
  for (const auto& [key, child] : children_) {
    edges.push_back({static_cast<int32_t>(key >> 8), child, static_cast<uint8_t>(key)});
  }
  std::sort(edges.begin(), edges.end(),
            [this](const Edge& a, const Edge& b) { return nodes_[a.child].depth < nodes_[b.child].depth; });
  for (const Edge& edge : edges) {
    Node& node = nodes_[edge.child];
    if (edge.parent != 0) {
      int32_t failure = nodes_[edge.parent].failure;
      while (failure != 0 && Child(failure, edge.byte) < 0) failure = nodes_[failure].failure;
      node.failure = std::max(0, Child(failure, edge.byte));
    }
    if (node.longest < 0) node.longest = nodes_[node.failure].longest;
  }
}

std::vector<AddedTokens::Finder::Found> AddedTokens::Finder::Find(absl::string_view text) const {
  std::vector<Found> found;  // every place where one begins, from the end of the text on
  int32_t node = 0;
  for (size_t i = text.size(); i-- > 0;) {
    const auto byte = static_cast<uint8_t>(text[i]);
    int32_t child;
    while ((child = Child(node, byte)) < 0 && node != 0) node = nodes_[node].failure;
    node = std::max(0, child);
    if (nodes_[node].longest >= 0) found.push_back({static_cast<int32_t>(i), nodes_[node].longest});
  }
  std::reverse(found.begin(), found.end());
  size_t kept = 0, end = 0;
  for (const Found& one : found) {
    if (static_cast<size_t>(one.begin) < end) continue;
    end = one.begin + tokens_[one.token].content.size();
    found[kept++] = one;
  }
  found.resize(kept);
  return found;
}

AddedTokens::AddedTokens(const std::vector<AddedToken>& tokens) : word_(kWordCharacter) {
  for (const AddedToken& token : tokens) (token.normalized ? second_ : first_).Add(token);
  first_.Build();
  second_.Build();
}

bool AddedTokens::IsWordBefore(absl::string_view text, size_t at, Pattern::Scratch& scratch) const {
  return at > 0 && word_.Match(text, CharacterBefore(text, at), scratch) > 0;
}

// Like AddedVocabulary::find_matches: what rstrip has taken may be found once more, as the search does not know of it.
void AddedTokens::SplitBy(const Finder& finder, absl::string_view text, bool parse_special, Part part) const {
  if (!finder.Finds(parse_special)) {
    if (!text.empty()) part(text, -1);
    return;
  }
  std::optional<Pattern::Scratch> scratch;
  size_t taken = 0, spaces_end = 0;
  for (const Finder::Found& found : finder.Find(text)) {
    const AddedToken& token = finder.token(found.token);
    if (token.special && !parse_special) continue;
    size_t begin = found.begin, end = begin + token.content.size();
    if (token.single_word) {
      if (!scratch.has_value()) scratch.emplace();
      if (IsWordBefore(text, begin, *scratch) || word_.Match(text, end, *scratch) > 0) continue;
    }
    if (token.lstrip) begin = SkipSpacesBack(text, begin, taken);
    if (token.rstrip) {
      // All that lies between a place and the end of the spaces there has been looked at once.
      if (end >= spaces_end) spaces_end = SkipSpaces(text, end);
      end = spaces_end;
    }
    if (taken < begin) part(text.substr(taken, begin - taken), -1);
    if (begin < end) part(text.substr(begin, end - begin), token.id);
    taken = end;
  }
  if (taken < text.size()) part(text.substr(taken), -1);
}

void AddedTokens::Split(absl::string_view text, bool parse_special, Part part) const {
  SplitBy(first_, text, parse_special, [&](absl::string_view stretch, int32_t id) {
    if (id >= 0) {
      part(stretch, id);
    } else {
      SplitBy(second_, stretch, parse_special, part);
    }
  });
}

}  // namespace dejavu
