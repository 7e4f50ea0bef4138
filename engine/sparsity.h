// What callers say about sparsity and what they hear back: tiers, densities, shadow results. Plain data; any thread.
#ifndef ENGINE_SPARSITY_H_
#define ENGINE_SPARSITY_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace dejavu {

// How much of the model a decode step may leave out, by falling quality. Prefill computes everything in every tier.
//   DENSE: everything is read.
//   EXACT: up-projection dense, then only the down rows of neurons that are not zero. The same tokens as DENSE.
//   HIGH, BALANCED, FAST: what a predictor selects, at operating points calibrated for rising loss.
enum class Tier : uint8_t { kDense, kExact, kHigh, kBalanced, kFast };
inline constexpr std::array<Tier, 5> kAllTiers = {Tier::kDense, Tier::kExact, Tier::kHigh, Tier::kBalanced,
                                                  Tier::kFast};
inline constexpr bool IsPredicted(Tier tier) { return tier >= Tier::kHigh; }
absl::string_view Name(Tier tier);                      // "dense", "exact", ...
std::optional<Tier> ParseTier(absl::string_view name);  // what Name gives

struct SparsityParams {
  Tier tier = Tier::kExact;
  // Compute exactly what this request's own prediction selects, whatever its batch-mates select: its tokens then do not
  // depend on them, as long as no layer falls back to EXACT (SparsityReport::fallback_share). DENSE and EXACT are so
  // anyway.
  bool deterministic = false;
  // Predicted tiers: beside one in so many decoded tokens, compute the dense result too and compare. 0: never. It
  // changes no token, unless what it finds makes a layer fall back.
  int32_t shadow_every = 0;
};

// Dense results beside sparse ones. Means over `tokens`; zero without any.
struct ShadowReport {
  int64_t tokens = 0;
  double top1_agreement = 0.0;  // share of tokens whose most likely successor is the same
  double kl_nats = 0.0;         // mean KL(dense || sparse) of the next-token distributions
  double recall = 0.0;          // of the neurons with a non-zero activation, the share that was selected
  double precision = 0.0;       // of the selected neurons, the share with a non-zero activation
  double missed_mass = 0.0;     // sum of activation^2 |down row|^2 over active neurons not selected, over that of all
};

// What one request's decode steps read. Shares are means over its decoded tokens and all layers.
struct SparsityReport {
  Tier tier = Tier::kExact;
  int64_t decode_tokens = 0;       // made by decode steps: all but the first, which the prompt's last step makes
  double mlp_density = 1.0;        // MLP weight rows that the request's own selection reads: (up + down) / 2
  double mlp_selected = 1.0;       // neurons whose up row it reads
  double mlp_active = 1.0;         // neurons whose down row it reads: DENSE all, else those with a non-zero activation
  double mlp_union_density = 1.0;  // MLP weight rows that its steps read for all their rows together
  double head_density = 1.0;       // heads computed
  double fallback_share = 0.0;  // of its layer passes, the share that ran EXACT because shadow checks had failed there
  ShadowReport shadow;
};

// One layer's counters since the start; they only grow.
struct LayerSparsityStats {
  int64_t steps = 0;           // decode steps that selected neurons here
  int64_t union_selected = 0;  // neurons computed in those, all rows together
  int64_t union_active = 0;    // and not zero in some row
  int64_t rows = 0;            // decode rows of a predicted tier
  int64_t selected = 0;        // neurons that those rows selected
  int64_t active = 0;          // and found not zero
  int64_t heads = 0;           // heads that those rows selected
  int64_t shadow_rows = 0;     // of those rows, how many were compared with everything computed
  int64_t shadow_selected = 0;
  int64_t shadow_active = 0;  // neurons not zero, selected or not
  int64_t shadow_hits = 0;    // selected and not zero
  double shadow_mass = 0.0;   // sum of activation^2 |down row|^2
  double shadow_missed_mass = 0.0;
  int64_t fallbacks = 0;     // times that a tier went EXACT here
  int64_t recoveries = 0;    // times that one came back
  uint32_t exact_tiers = 0;  // bit t: tier t runs EXACT here now, because its shadow checks failed
};

// Of all layers; they only grow.
struct SparsityTotals {
  int64_t shadow_tokens = 0;
  int64_t shadow_agreements = 0;  // of those, how many had the same most likely successor
  double shadow_kl_nats = 0.0;    // sum
  int64_t group_steps = 0;        // steps with decode rows of a group of ranks
  double imbalance = 0.0;         // sum over them of StepCounts::imbalance
};

struct SparsityStats : SparsityTotals {
  std::vector<LayerSparsityStats> layers;
  // What runs EXACT now because its shadow checks failed.
  struct Fallback {
    Tier tier;
    int32_t layer;
  };
  std::vector<Fallback> exact_now;
};

// What an engine knows about its predictor.
struct PredictorInfo {
  std::string path;         // empty: none is loaded
  std::string tap;          // "attention-norm", "mlp-norm" or "previous-layer"
  std::vector<Tier> tiers;  // the predicted tiers that it can serve
  int64_t bytes = 0;
};

}  // namespace dejavu

#endif  // ENGINE_SPARSITY_H_
