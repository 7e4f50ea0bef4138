// The values of the API's enums as people write them: "balanced" for TIER_BALANCED.
#ifndef LOADTEST_CLIENT_NAMES_H_
#define LOADTEST_CLIENT_NAMES_H_

#include <optional>
#include <string>
#include <vector>

#include "dejavu/v1/generation.pb.h"

namespace dejavu {

// "unspecified" for 0, "unknown" for a value that this build does not know.
std::string TierName(v1::Tier tier);
std::string FinishReasonName(v1::FinishReason reason);

// Nothing for a name that is none.
std::optional<v1::Tier> TierOf(const std::string& name);
std::optional<v1::SpeculationMode> SpeculationModeOf(const std::string& name);
std::optional<v1::Urgency> UrgencyOf(const std::string& name);

inline const std::vector<std::string> kTierNames = {"dense", "exact", "high", "balanced", "fast"};
inline const std::vector<std::string> kSpeculationNames = {"off", "auto", "always"};
inline const std::vector<std::string> kUrgencyNames = {"interactive", "normal", "batch"};

}  // namespace dejavu

#endif  // LOADTEST_CLIENT_NAMES_H_
