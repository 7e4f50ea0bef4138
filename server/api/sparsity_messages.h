// What the engine knows of sparsity, as messages of the API. Pure functions; any thread.
#ifndef SERVER_API_SPARSITY_MESSAGES_H_
#define SERVER_API_SPARSITY_MESSAGES_H_

#include <optional>

#include "dejavu/v1/generation.pb.h"
#include "engine/engine.h"
#include "engine/sparsity.h"
#include "server/options.h"

namespace dejavu {

v1::Tier ToMessage(Tier tier);
std::optional<Tier> FromMessage(v1::Tier tier);  // nothing for TIER_UNSPECIFIED and for numbers that the API lacks

// Means of a layer since the start, shares of its neurons and heads; 0 where nothing was counted.
struct LayerShares {
  double mlp_density = 0.0;  // MLP weight rows that a decode row's own selection reads, up and down together
  double head_density = 0.0;
  double union_density = 0.0;  // neurons that a step computes for all its rows
  double recall = 0.0, precision = 0.0, missed_mass = 0.0;
};
LayerShares SharesOf(const LayerSparsityStats& layer, const ModelShape& shape);

// The tiers that `options` lets requests ask for.
bool IsAllowed(Tier tier, const ServerOptions& options);

// `shadow` is there only when a token was compared.
void FillReport(const SparsityReport& report, v1::SparsityReport* message);

// `engine` is null while the model is loading: then only what `options` say is known.
void FillInfo(const ServerOptions& options, const Engine* engine, v1::SparsityInfo* message);

}  // namespace dejavu

#endif  // SERVER_API_SPARSITY_MESSAGES_H_
