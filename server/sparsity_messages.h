// What the engine knows of sparsity, as messages of the API. Pure functions; any thread.
#ifndef SERVER_SPARSITY_MESSAGES_H_
#define SERVER_SPARSITY_MESSAGES_H_

#include <optional>

#include "dejavu/v1/generation.pb.h"
#include "engine/engine.h"
#include "engine/sparsity.h"
#include "server/options.h"

namespace dejavu {

v1::Tier ToMessage(Tier tier);
std::optional<Tier> FromMessage(v1::Tier tier);  // nothing for TIER_UNSPECIFIED and for numbers that the API lacks

// The tiers that `options` lets requests ask for.
bool IsAllowed(Tier tier, const ServerOptions& options);

// `shadow` is there only when a token was compared.
void FillReport(const SparsityReport& report, v1::SparsityReport* message);

// `engine` is null while the model is loading: then only what `options` say is known.
void FillInfo(const ServerOptions& options, const Engine* engine, v1::SparsityInfo* message);

}  // namespace dejavu

#endif  // SERVER_SPARSITY_MESSAGES_H_
