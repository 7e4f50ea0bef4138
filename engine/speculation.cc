#include "engine/speculation.h"

namespace dejavu {

absl::string_view Name(SpeculationMode mode) {
  switch (mode) {
    case SpeculationMode::kOff:
      return "off";
    case SpeculationMode::kAuto:
      return "auto";
    case SpeculationMode::kAlways:
      return "always";
  }
  return "";
}

std::optional<SpeculationMode> ParseSpeculationMode(absl::string_view name) {
  for (const auto mode : {SpeculationMode::kOff, SpeculationMode::kAuto, SpeculationMode::kAlways}) {
    if (name == Name(mode)) return mode;
  }
  return std::nullopt;
}

absl::string_view Name(DraftSource source) { return source == DraftSource::kTier ? "tier" : "lookup"; }

}  // namespace dejavu
