// What callers say about speculation and what they hear back. A draft guesses the next tokens cheaply; one step of the
// request's own tier checks them all, and keeps those that it would have drawn itself. Plain data; any thread.
#ifndef ENGINE_SPECULATION_H_
#define ENGINE_SPECULATION_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/strings/string_view.h"
#include "engine/sparsity.h"

namespace dejavu {

enum class SpeculationMode : uint8_t {
  kOff,
  kAuto,    // where it is expected to be faster, as far as that pays
  kAlways,  // as many drafts as may be, whatever they cost: others wait meanwhile
};
absl::string_view Name(SpeculationMode mode);  // "off", "auto", "always"
std::optional<SpeculationMode> ParseSpeculationMode(absl::string_view name);

inline constexpr int32_t kMostDraftTokens = 16;  // of a round

// No tokens change by it. Only texts of DENSE and EXACT are speculated on.
struct SpeculationParams {
  SpeculationMode mode = SpeculationMode::kOff;
  Tier draft_tier = Tier::kHigh;  // a predicted one that drafts; any other: none does
  bool lookup = true;             // drafts may also be what followed the last few tokens when they came before
  int32_t most_tokens = 6;        // drafted in a round, 1 ... kMostDraftTokens
  bool tier_drafts() const { return IsPredicted(draft_tier); }
};

enum class DraftSource : uint8_t { kTier, kLookup };
inline constexpr size_t kDraftSources = 2;
absl::string_view Name(DraftSource source);  // "tier", "lookup"

struct DraftCounts {
  int64_t drafted = 0;
  int64_t accepted = 0;
};

// Of one request.
struct SpeculationReport {
  Tier draft_tier = Tier::kDense;  // the one that has drafted; kDense: none has
  int64_t rounds = 0;              // drafts that were checked
  int64_t tokens = 0;              // that those checks gave, accepted ones and the ones after them
  std::array<DraftCounts, kDraftSources> of_source;
};

// Of all requests, since the start; they only grow.
struct SpeculationTotals {
  int64_t rounds = 0;  // of requests: a step may check those of several
  int64_t tokens = 0;
  std::array<DraftCounts, kAllTiers.size()> of_tier;
  DraftCounts lookup;
  double spent_ms = 0.0;  // by steps that drafted or checked
  double plain_ms = 0.0;  // that the same tokens would have taken without, as far as is known
};

}  // namespace dejavu

#endif  // ENGINE_SPECULATION_H_
