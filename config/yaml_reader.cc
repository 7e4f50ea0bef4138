// Listens to yaml-cpp's parser events instead of building its node tree: the tree drops the places of keys, takes
// duplicates silently and resolves aliases. The first thing that is wrong is kept; later events are ignored.
#include "config/yaml_reader.h"

#include <algorithm>
#include <exception>
#include <set>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/utf8.h"
#include "yaml-cpp/eventhandler.h"
#include "yaml-cpp/exceptions.h"
#include "yaml-cpp/mark.h"
#include "yaml-cpp/parser.h"

namespace dejavu {
namespace {

constexpr int kMaxDepth = 16;  // the keys need 2

std::string Place(const std::string& name, int line, int column) { return absl::StrCat(name, ":", line, ":", column); }

class EntryCollector : public YAML::EventHandler {
 public:
  explicit EntryCollector(const std::string& name) : name_(name) {}

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) Fail(mark, "a second document; only one is allowed");
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    if (!Begin(mark, "?", anchor)) return;
    if (frames_.empty()) return;  // a file of comments only
    TakeScalar(mark, YamlEntry::kNull, "");
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override { Fail(mark, "aliases are not allowed"); }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    if (!Begin(mark, tag, anchor)) return;
    if (frames_.empty()) return Fail(mark, "the file must hold `key: value` lines");
    TakeScalar(mark, tag == "!" ? YamlEntry::kQuoted : YamlEntry::kPlain, value);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    Open(mark, tag, anchor, YamlEntry::kSequence);
  }
  void OnSequenceEnd() override { Close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    Open(mark, tag, anchor, YamlEntry::kMapping);
  }
  void OnMapEnd() override { Close(); }

  const std::string& error() const { return error_; }
  std::vector<YamlEntry> TakeEntries() { return std::move(entries_); }

 private:
  struct Frame {  // one open mapping or sequence
    YamlEntry::Kind kind = YamlEntry::kMapping;
    std::string prefix;          // "kv."
    std::set<std::string> keys;  // seen in it
    bool has_key = false;        // a key waits for its value
    std::string key, key_place;
  };

  void Fail(const YAML::Mark& mark, absl::string_view reason) {
    FailAt(Place(name_, mark.line + 1, mark.column + 1), reason);
  }
  void FailAt(const std::string& place, absl::string_view reason) {
    if (error_.empty()) error_ = absl::StrCat(place, ": ", reason);
  }

  // False when the event is not to be looked at.
  bool Begin(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    if (anchor != 0) Fail(mark, "anchors are not allowed");
    if (!tag.empty() && tag != "?" && tag != "!") Fail(mark, absl::StrCat("the tag ", tag, " is not allowed"));
    return error_.empty();
  }

  void TakeScalar(const YAML::Mark& mark, YamlEntry::Kind kind, const std::string& value) {
    Frame& frame = frames_.back();
    if (frame.kind == YamlEntry::kSequence) return;  // no key takes one: its own entry says enough
    if (frame.has_key) return AddEntry(mark, kind, value);
    if (kind == YamlEntry::kNull) return Fail(mark, "a key is missing");
    if (!frame.keys.insert(value).second) {
      return Fail(mark, absl::StrCat("the key ", frame.prefix, value, " stands there twice"));
    }
    frame.has_key = true;
    frame.key = value;
    frame.key_place = Place(name_, mark.line + 1, mark.column + 1);
  }

  void AddEntry(const YAML::Mark& mark, YamlEntry::Kind kind, const std::string& value) {
    Frame& frame = frames_.back();
    const std::string path = frame.prefix + frame.key;
    // Once more over all of the file: `a: {b: 1}` and `a.b: 1` are the same key.
    if (!paths_.insert(path).second)
      return FailAt(frame.key_place, absl::StrCat("the key ", path, " stands there twice"));
    entries_.push_back({path, kind, value, frame.key_place, Place(name_, mark.line + 1, mark.column + 1)});
    frame.has_key = false;
  }

  void Open(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, YamlEntry::Kind kind) {
    if (!Begin(mark, tag, anchor)) return;
    if (frames_.size() == kMaxDepth) return Fail(mark, absl::StrCat("nested deeper than ", kMaxDepth, " levels"));
    Frame opened;
    opened.kind = kind;
    if (frames_.empty()) {
      if (kind == YamlEntry::kSequence) return Fail(mark, "the file must hold `key: value` lines, not a list");
    } else if (frames_.back().kind == YamlEntry::kSequence) {
      opened.kind = YamlEntry::kSequence;  // what lies inside of a sequence is skipped with it
    } else {
      if (!frames_.back().has_key) return Fail(mark, "a key must be a plain word");
      opened.prefix = absl::StrCat(frames_.back().prefix, frames_.back().key, ".");
      AddEntry(mark, kind, "");
    }
    frames_.push_back(std::move(opened));
  }

  void Close() {
    if (error_.empty()) frames_.pop_back();
  }

  const std::string& name_;
  int documents_ = 0;
  std::vector<Frame> frames_;
  std::set<std::string> paths_;
  std::vector<YamlEntry> entries_;
  std::string error_;
};

std::string PlaceOfByte(const std::string& name, absl::string_view text, size_t at) {
  const absl::string_view before = text.substr(0, at);
  const size_t line_start = before.rfind('\n') + 1;  // npos + 1 is 0
  const auto line = std::count(before.begin(), before.end(), '\n') + 1;
  return Place(name, static_cast<int>(line), static_cast<int>(at - line_start) + 1);
}

}  // namespace

absl::StatusOr<std::vector<YamlEntry>> ReadYaml(const std::string& text, const std::string& name) {
  if (text.size() > kMaxYamlBytes) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": longer than ", kMaxYamlBytes, " bytes"));
  }
  const size_t valid = std::min(ValidUtf8Prefix(text), text.find('\0'));
  if (valid < text.size()) {
    return absl::InvalidArgumentError(absl::StrCat(PlaceOfByte(name, text, valid), ": not UTF-8 text"));
  }
  EntryCollector collector(name);
  try {
    std::istringstream stream(text);
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(collector)) {
      if (!collector.error().empty()) break;
    }
  } catch (const YAML::Exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(Place(name, e.mark.line + 1, e.mark.column + 1), ": ", e.msg));
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", e.what()));
  }
  if (!collector.error().empty()) return absl::InvalidArgumentError(collector.error());
  return collector.TakeEntries();
}

}  // namespace dejavu
