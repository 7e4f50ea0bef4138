#include "engine/sparsity.h"

namespace dejavu {

absl::string_view Name(Tier tier) {
  switch (tier) {
    case Tier::kDense:
      return "dense";
    case Tier::kExact:
      return "exact";
    case Tier::kHigh:
      return "high";
    case Tier::kBalanced:
      return "balanced";
    case Tier::kFast:
      return "fast";
  }
  return "unknown";
}

std::optional<Tier> ParseTier(absl::string_view name) {
  for (const Tier tier : kAllTiers) {
    if (Name(tier) == name) return tier;
  }
  return std::nullopt;
}

}  // namespace dejavu
