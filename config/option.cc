#include "config/option.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <numeric>
#include <type_traits>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "kernels/base/utf8.h"

namespace dejavu {
namespace {

std::string NumberText(double value) {
  char text[32];
  const auto [end, error] = std::to_chars(text, text + sizeof text, value, std::chars_format::fixed);
  return std::string(text, error == std::errc() ? end : text);
}

template <typename Number>
bool ParseNumber(absl::string_view text, Number* value) {
  if constexpr (std::is_same_v<Number, double>) {
    return absl::SimpleAtod(text, value);
  } else {
    return absl::SimpleAtoi(text, value);
  }
}

int EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<int> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

}  // namespace

std::string FlagName(absl::string_view key) {
  return absl::StrCat("--", absl::StrReplaceAll(key, {{".", "-"}, {"_", "-"}}));
}

std::string EnvironmentName(absl::string_view key) {
  return absl::StrCat("DEJAVUD_", absl::AsciiStrToUpper(absl::StrReplaceAll(key, {{".", "_"}})));
}

std::string LimitText(const Option& option) {
  if (option.is_bool()) return "true or false";
  if (!option.is_text()) return absl::StrCat(NumberText(option.limits.least), " to ", NumberText(option.limits.most));
  if (option.choices.empty()) return "";
  const auto last = option.choices.end() - 1;
  return absl::StrCat(absl::StrJoin(option.choices.begin(), last, ", "), " or ", *last);
}

absl::Status SetOption(const Option& option, absl::string_view text) {
  const auto refuse = [&](absl::string_view limit) {
    return absl::InvalidArgumentError(absl::StrCat(option.key, " is \"", text, "\"; ", limit));
  };
  return std::visit(
      [&](auto* target) -> absl::Status {
        using Value = std::remove_pointer_t<decltype(target)>;
        if constexpr (std::is_same_v<Value, std::string>) {
          if (!IsValidUtf8(text)) return absl::InvalidArgumentError(absl::StrCat(option.key, " is not valid UTF-8"));
          if (text.find('\0') != text.npos) return refuse("a zero byte is not allowed");
          if (!option.choices.empty() && std::count(option.choices.begin(), option.choices.end(), text) == 0) {
            return refuse(absl::StrCat("must be ", LimitText(option)));
          }
          if (option.check != nullptr) {
            const absl::Status checked = option.check(text);
            if (!checked.ok()) return refuse(checked.message());
          }
          *target = std::string(text);
        } else if constexpr (std::is_same_v<Value, Tier>) {
          const auto found = std::find(option.choices.begin(), option.choices.end(), text);
          if (found == option.choices.end()) return refuse(absl::StrCat("must be ", LimitText(option)));
          *target = static_cast<Tier>(found - option.choices.begin());
        } else if constexpr (std::is_same_v<Value, bool>) {
          if (text != "true" && text != "false") return refuse("must be true or false");
          *target = text == "true";
        } else {
          Value value = 0;
          const bool in_range =
              ParseNumber(text, &value) && value >= option.limits.least && value <= option.limits.most;
          const char* type = std::is_same_v<Value, double> ? "number" : "whole number";
          if (!in_range) return refuse(absl::StrCat("must be a ", type, ", ", LimitText(option)));
          *target = value;
        }
        return absl::OkStatus();
      },
      option.target);
}

std::string OptionText(const Option& option) {
  return std::visit(
      [&](auto* target) -> std::string {
        using Value = std::remove_pointer_t<decltype(target)>;
        if constexpr (std::is_same_v<Value, std::string>) {
          return *target;
        } else if constexpr (std::is_same_v<Value, Tier>) {
          return option.choices[static_cast<size_t>(*target)];
        } else if constexpr (std::is_same_v<Value, bool>) {
          return *target ? "true" : "false";
        } else if constexpr (std::is_same_v<Value, double>) {
          return NumberText(*target);
        } else {
          return absl::StrCat(*target);
        }
      },
      option.target);
}

std::string Nearest(absl::string_view wrong, const std::vector<std::string>& candidates) {
  std::string best;
  int best_distance = static_cast<int>(wrong.size()) / 3 + 1;  // further away it is a guess, not a typing error
  for (const std::string& candidate : candidates) {
    // A difference in length alone is so much of a distance: a long text is compared with nothing.
    const auto longer = static_cast<int64_t>(wrong.size()) - static_cast<int64_t>(candidate.size());
    const int distance = std::abs(longer) < best_distance ? EditDistance(wrong, candidate) : best_distance;
    if (distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
    // The right name without its section.
    const absl::string_view name = absl::string_view(candidate).substr(candidate.rfind('.') + 1);
    if (name == wrong) return candidate;
  }
  return best;
}

}  // namespace dejavu
