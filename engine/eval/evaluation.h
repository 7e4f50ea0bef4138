// Evaluate: what the tiers of a model cost in quality and save in weight bytes, on a stream of tokens. Teacher-forced:
// every token is computed as a decode step of its tier would compute it, over keys and values of the same tier. One
// thread.
#ifndef ENGINE_EVAL_EVALUATION_H_
#define ENGINE_EVAL_EVALUATION_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/model/predictor_data.h"
#include "engine/ranks/model_runner.h"
#include "engine/sparsity.h"

namespace dejavu {

struct EvaluationOptions {
  std::vector<Tier> tiers;
  // False: every row computes what it selects itself, as a lone request does. True: each step holds one row of each of
  // the runner's slots, and they compute the union of what they select. Then only whole windows count, and only as many
  // as fill the slots.
  bool union_of_rows = false;
};

// Means over the scored tokens, of one layer or over all of them. Densities and shares are fractions; with
// `union_of_rows` what is read is the union's, once per step. NaN: nothing to compute it from.
struct ReadFigures {
  double mlp_selected = 0.0;      // neurons whose up row is read
  double mlp_active = 0.0;        // neurons whose down row is read: DENSE all, else those that are not zero
  double mlp_own_selected = 0.0;  // neurons that a row selects itself: mlp_selected but for unions
  double head_density = 0.0;
  double mlp_byte_share =
      0.0;  // bytes of these rows, the down bias and the neurons' predictor over those of a dense MLP
  // A row's own selection against all its non-zero neurons, as in ShadowReport, over layers with an operating point.
  // Where there is none everything is computed: recall 1, precision the share of neurons that are not zero.
  double recall = 0.0, precision = 0.0, missed_mass = 0.0;
  double missed_share = 0.0;  // mean over tokens of each one's own missed share, where it has any mass

  double mlp_density() const { return (mlp_selected + mlp_active) / 2.0; }
};

struct TierEvaluation {
  Tier tier = Tier::kDense;
  double perplexity = 0.0;
  double perplexity_change = 0.0;  // against DENSE, as a fraction
  double top1_agreement = 0.0;     // how often the most likely token is DENSE's
  double kl_nats = 0.0;            // mean KL(DENSE || tier) of the next-token distributions
  ReadFigures mean;
  double weight_bytes_per_token = 0.0;  // everything that a decoded token reads, predictor included
  double byte_ceiling = 0.0;            // DENSE's over the tier's: what the speed-up can reach where bytes decide
  std::vector<ReadFigures> layers;
};

struct Evaluation {
  DType weight_dtype = DType::kFloat32;
  int64_t tokens = 0;  // scored
  std::vector<TierEvaluation> tiers;
};

// Rows computed so far and in all. Returning false stops the evaluation with CANCELLED.
using EvaluationProgress = std::function<bool(int64_t done_rows, int64_t total_rows)>;

// Cuts `tokens` into windows of the runner's length and runs its slots side by side, DENSE first. The first token of a
// window is not scored; a last incomplete window of at least two tokens counts. The runner must allow as many audits as
// rows where a predicted tier is asked for; its predictor is replaced by `predictor`, which may be nullptr. How many
// rows the runner puts into a step changes no figure without `union_of_rows` (kernels/backend.h, determinism).
// INVALID_ARGUMENT for tokens that are too few or beyond the vocabulary, FAILED_PRECONDITION for a tier that
// `predictor` does not serve, DATA_LOSS for logits that are not finite.
absl::StatusOr<Evaluation> Evaluate(ModelRunner& runner, const PredictorData* predictor,
                                    absl::Span<const int32_t> tokens, const EvaluationOptions& options,
                                    const EvaluationProgress& progress);

}  // namespace dejavu

#endif  // ENGINE_EVAL_EVALUATION_H_
