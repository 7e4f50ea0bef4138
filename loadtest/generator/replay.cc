#include "loadtest/generator/replay.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

using Json = nlohmann::json;

constexpr int32_t kMostTokens = 1 << 20;
constexpr const char* kColumns[] = {"offset_s", "prompt_tokens", "max_new_tokens", "seed", "tier", "tenant", "urgency"};

const std::set<std::string>& Tiers() {
  static const auto& tiers = *new std::set<std::string>{"dense", "exact", "high", "balanced", "fast"};
  return tiers;
}

absl::Status Check(const ReplayedRequest& r) {
  if (!std::isfinite(r.offset_s)) return absl::InvalidArgumentError("offset_s is not a number");
  for (const auto& [name, tokens] :
       {std::pair("prompt_tokens", r.prompt_tokens), {"max_new_tokens", r.max_new_tokens}}) {
    if (tokens < 1 || tokens > kMostTokens) {
      return absl::InvalidArgumentError(absl::StrCat(name, " is ", tokens, "; it must be 1 to ", kMostTokens));
    }
  }
  if (!r.tier.empty() && Tiers().count(r.tier) == 0) {
    return absl::InvalidArgumentError(absl::StrCat("'", r.tier, "' is not a tier"));
  }
  return absl::OkStatus();
}

absl::Status SetColumn(const std::string& column, absl::string_view text, ReplayedRequest* r) {
  const auto number = [&](auto* value) {
    return absl::SimpleAtoi(text, value)
               ? absl::OkStatus()
               : absl::InvalidArgumentError(absl::StrCat(column, " is '", text, "', which is no whole number"));
  };
  if (column == "offset_s") {
    return absl::SimpleAtod(text, &r->offset_s)
               ? absl::OkStatus()
               : absl::InvalidArgumentError(absl::StrCat("offset_s is '", text, "', which is no number"));
  }
  if (column == "prompt_tokens") return number(&r->prompt_tokens);
  if (column == "max_new_tokens") return number(&r->max_new_tokens);
  if (column == "seed") {
    if (text.empty()) return absl::OkStatus();
    return number(&r->seed.emplace());
  }
  (column == "tier" ? r->tier : column == "tenant" ? r->tenant : r->urgency) = std::string(text);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> ParseHeader(const std::string& line) {
  const std::vector<std::string> columns = absl::StrSplit(line, ',');
  for (const std::string& column : columns) {
    if (std::find(std::begin(kColumns), std::end(kColumns), column) == std::end(kColumns)) {
      return absl::InvalidArgumentError(
          absl::StrCat("no column '", column, "'; there are ", absl::StrJoin(kColumns, ", ")));
    }
  }
  for (const char* needed : {"offset_s", "prompt_tokens", "max_new_tokens"}) {
    if (std::find(columns.begin(), columns.end(), needed) == columns.end()) {
      return absl::InvalidArgumentError(absl::StrCat("the column ", needed, " is missing"));
    }
  }
  return columns;
}

absl::StatusOr<ReplayedRequest> ParseCsvLine(const std::vector<std::string>& columns, const std::string& line) {
  const std::vector<absl::string_view> cells = absl::StrSplit(line, ',');
  if (cells.size() != columns.size()) {
    return absl::InvalidArgumentError(absl::StrCat(cells.size(), " cells under ", columns.size(), " columns"));
  }
  ReplayedRequest r;
  for (size_t i = 0; i < cells.size(); ++i) {
    RETURN_IF_ERROR(SetColumn(columns[i], absl::StripAsciiWhitespace(cells[i]), &r));
  }
  RETURN_IF_ERROR(Check(r));
  return r;
}

// The value of `key`, or INVALID_ARGUMENT.
template <typename T>
absl::Status Get(const Json& json, const char* key, bool needed, T* value) {
  const auto found = json.find(key);
  if (found == json.end()) {
    return needed ? absl::InvalidArgumentError(absl::StrCat("there is no ", key)) : absl::OkStatus();
  }
  const bool fits = std::is_same_v<T, std::string> ? found->is_string()
                    : std::is_same_v<T, double>    ? found->is_number()
                                                   : found->is_number_integer();
  if (!fits) return absl::InvalidArgumentError(absl::StrCat(key, " is ", found->dump()));
  found->get_to(*value);
  return absl::OkStatus();
}

// Nothing: a line of the daemon's log that is not about a generation.
absl::StatusOr<std::optional<ReplayedRequest>> ParseJsonLine(const std::string& line) {
  const Json json = Json::parse(line, nullptr, false);
  if (!json.is_object()) return absl::InvalidArgumentError("this is not a JSON object");
  ReplayedRequest r;
  const bool logged = json.contains("offset_s") == false && json.contains("level");
  // Other methods, and what was refused because it was wrong.
  if (logged && (!json.contains("arrival_s") || !json.contains("max_new_tokens"))) return std::nullopt;
  RETURN_IF_ERROR(Get(json, logged ? "arrival_s" : "offset_s", true, &r.offset_s));
  int64_t tokens = 0;
  for (const auto& [key, field] :
       {std::pair("prompt_tokens", &r.prompt_tokens), {"max_new_tokens", &r.max_new_tokens}}) {
    RETURN_IF_ERROR(Get(json, key, true, &tokens));
    *field = static_cast<int32_t>(std::clamp<int64_t>(tokens, -1, kMostTokens + 1));
  }
  if (logged && json.contains("samples")) {  // then its tokens are sums
    RETURN_IF_ERROR(Get(json, "samples", true, &tokens));
    r.prompt_tokens /= static_cast<int32_t>(std::clamp<int64_t>(tokens, 1, kMostTokens));
  }
  if (json.contains("seed")) RETURN_IF_ERROR(Get(json, "seed", true, &r.seed.emplace()));
  RETURN_IF_ERROR(Get(json, "tier", false, &r.tier));
  RETURN_IF_ERROR(Get(json, "tenant", false, &r.tenant));
  RETURN_IF_ERROR(Get(json, logged ? "priority" : "urgency", false, &r.urgency));
  RETURN_IF_ERROR(Check(r));
  return r;
}

}  // namespace

absl::StatusOr<std::vector<ReplayedRequest>> ParseReplay(std::istream* in, const std::string& name) {
  std::vector<ReplayedRequest> requests;
  std::vector<std::string> columns;
  std::string line;
  for (int64_t number = 1; std::getline(*in, line); ++number) {
    const auto at = [&](const absl::Status& status) {
      return absl::InvalidArgumentError(absl::StrCat(name, ":", number, ": ", status.message()));
    };
    line = std::string(absl::StripAsciiWhitespace(line));
    if (line.empty()) continue;
    if (line[0] == '{') {
      auto request = ParseJsonLine(line);
      if (!request.ok()) return at(request.status());
      if (request->has_value()) requests.push_back(**std::move(request));
    } else if (columns.empty()) {
      auto header = ParseHeader(line);
      if (!header.ok()) return at(header.status());
      columns = *std::move(header);
    } else {
      auto request = ParseCsvLine(columns, line);
      if (!request.ok()) return at(request.status());
      requests.push_back(*std::move(request));
    }
  }
  if (requests.empty()) return absl::InvalidArgumentError(absl::StrCat(name, " holds no request"));
  // A log is in the order of ends.
  std::stable_sort(requests.begin(), requests.end(),
                   [](const auto& a, const auto& b) { return a.offset_s < b.offset_s; });
  const double first_s = requests.front().offset_s;
  for (ReplayedRequest& request : requests) request.offset_s -= first_s;
  return requests;
}

absl::StatusOr<std::vector<ReplayedRequest>> ReadReplay(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::InvalidArgumentError(absl::StrCat("cannot read ", path));
  return ParseReplay(&file, path);
}

}  // namespace dejavu
