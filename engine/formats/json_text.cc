// Two passes: the first builds nothing and only looks for what is refused, the second builds the document.
#include "engine/formats/json_text.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"

namespace dejavu {
namespace {

constexpr int kMaxDepth = 32;
constexpr int64_t kMaxJsonValues = 2'000'000;  // a checkpoint of 100,000 tensors has half as many

class Inspector : public nlohmann::json_sax<nlohmann::json> {
 public:
  const std::string& problem() const { return problem_; }

  bool null() override { return Value(); }
  bool boolean(bool) override { return Value(); }
  bool number_integer(number_integer_t) override { return Value(); }
  bool number_unsigned(number_unsigned_t) override { return Value(); }
  bool number_float(number_float_t, const string_t&) override { return Value(); }
  bool string(string_t&) override { return Value(); }
  bool binary(binary_t&) override { return Value(); }
  bool start_object(std::size_t) override { return Open(); }
  bool start_array(std::size_t) override { return Open(); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    return Refuse(absl::StrCat("key ", Quoted(name), " appears twice in one object"));
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    return Refuse(absl::StrCat("not valid JSON at byte ", position));
  }

 private:
  bool Refuse(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }

  bool Value() {
    return ++values_ <= kMaxJsonValues || Refuse(absl::StrCat("more than ", kMaxJsonValues, " JSON values"));
  }

  bool Open() {
    keys_.emplace_back();
    return keys_.size() <= kMaxDepth ? Value() : Refuse(absl::StrCat("JSON nested deeper than ", kMaxDepth));
  }

  bool Close() {
    keys_.pop_back();
    return true;
  }

  std::vector<absl::flat_hash_set<std::string>> keys_;  // of every open object; empty sets for arrays
  int64_t values_ = 0;
  std::string problem_;
};

// `text` with quotation marks around the constants that Python adds to JSON.
std::string QuoteConstants(absl::string_view text) {
  std::string quoted;
  bool in_string = false;
  while (!text.empty()) {
    size_t length = 1;
    if (in_string && text[0] == '\\') {
      length = std::min<size_t>(2, text.size());
    } else if (text[0] == '"') {
      in_string = !in_string;
    } else if (!in_string) {
      for (const absl::string_view constant : {"NaN", "Infinity", "-Infinity"}) {
        if (absl::StartsWith(text, constant)) length = constant.size();
      }
    }
    const absl::string_view piece = text.substr(0, length);
    length > 2 ? absl::StrAppend(&quoted, "\"", piece, "\"") : absl::StrAppend(&quoted, piece);
    text.remove_prefix(length);
  }
  return quoted;
}

}  // namespace

absl::StatusOr<nlohmann::json> ParseJsonObject(const std::string& text, const std::string& source,
                                               JsonDialect dialect) {
  // nlohmann::json passes over the one and takes the other for the end.
  if (absl::StartsWith(text, "\xEF\xBB\xBF")) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": begins with a byte order mark, which JSON does not have"));
  }
  if (const size_t zero = text.find('\0'); zero != std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": not valid JSON at byte ", zero + 1));
  }
  if (dialect == JsonDialect::kPython && (absl::StrContains(text, "NaN") || absl::StrContains(text, "Infinity"))) {
    return ParseJsonObject(QuoteConstants(text), source);
  }
  Inspector inspector;
  if (!nlohmann::json::sax_parse(text, &inspector)) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": ", inspector.problem()));
  }
  nlohmann::json document = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!document.is_object()) return absl::InvalidArgumentError(absl::StrCat(source, ": JSON, but not an object"));
  return document;
}

}  // namespace dejavu
