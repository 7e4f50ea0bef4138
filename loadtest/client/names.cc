#include "loadtest/client/names.h"

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace dejavu {
namespace {

std::string ShortName(absl::string_view name, absl::string_view prefix) {
  return absl::AsciiStrToLower(absl::StartsWith(name, prefix) ? name.substr(prefix.size()) : "unknown");
}

template <typename Enum>
std::optional<Enum> Parsed(bool (*parse)(const std::string&, Enum*), const char* prefix, const std::string& name) {
  Enum value;
  if (name.empty() || !parse(absl::StrCat(prefix, absl::AsciiStrToUpper(name)), &value)) return std::nullopt;
  return value;
}

}  // namespace

std::string TierName(v1::Tier tier) { return ShortName(v1::Tier_Name(tier), "TIER_"); }

std::string FinishReasonName(v1::FinishReason reason) {
  return ShortName(v1::FinishReason_Name(reason), "FINISH_REASON_");
}

std::optional<v1::Tier> TierOf(const std::string& name) {
  return Parsed<v1::Tier>([](const std::string& full, v1::Tier* tier) { return v1::Tier_Parse(full, tier); }, "TIER_",
                          name);
}

std::optional<v1::SpeculationMode> SpeculationModeOf(const std::string& name) {
  return Parsed<v1::SpeculationMode>(
      [](const std::string& full, v1::SpeculationMode* mode) { return v1::SpeculationMode_Parse(full, mode); },
      "SPECULATION_MODE_", name);
}

std::optional<v1::Urgency> UrgencyOf(const std::string& name) {
  return Parsed<v1::Urgency>(
      [](const std::string& full, v1::Urgency* urgency) { return v1::Urgency_Parse(full, urgency); }, "URGENCY_", name);
}

}  // namespace dejavu
