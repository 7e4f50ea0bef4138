// CostModel: how long a step takes, learned from the steps just run.
//
//   ms = base of the dearest tier in the step, or of drafts + row * decode rows + check_row * check rows +
//   prefill_token * prompt rows + context_token * context
//
// fitted by recursive least squares with forgetting (Haykin, Adaptive Filter Theory, 4th ed., 9.3) among coefficients
// that are not negative. A few steps that the system held up, for however long, move the fit by a
// bounded share; as soon as kNewLevel in a row say so, the fit begins anew from them. Pure arithmetic, nothing
// allocates. Engine thread only.
#ifndef ENGINE_SCHEDULING_COST_MODEL_H_
#define ENGINE_SCHEDULING_COST_MODEL_H_

#include <array>
#include <cstdint>

#include "engine/sparsity.h"
#include "engine/stats.h"

namespace dejavu {

struct StepShape {
  Tier tier = Tier::kDense;  // of the row that reads most; kExact where a prompt is computed
  int32_t decode_rows = 0;
  int32_t prefill_rows = 0;
  int64_t context_tokens = 0;  // positions that the decode rows look back at, all together
  int32_t check_rows = 0;      // of drafts, beside the decode rows of their sequences
  bool drafts = false;         // a step that drafts: nobody gets a token by it
};

class CostModel {
 public:
  CostModel();
  // A simulator's truth, or a start from an earlier run; counts as learned. Without a cost of drafts of their own (0)
  // they cost what a predicted tier does.
  explicit CostModel(const CostParameters& known);

  void Observe(const StepShape& shape, double ms);
  double Predict(const StepShape& shape) const;
  CostParameters parameters() const;
  // The least that one of the latest steps of each kind took, as a share of what is predicted for it now; at most 1.
  double best_share() const;
  // Predictions before that many steps are guesses.
  bool learned() const { return steps_ >= kLearned; }
  // A tier like this one has run, other than to draft.
  bool has_run(Tier tier) const;
  int64_t steps() const { return steps_; }

  static constexpr int kNewLevel = 8;  // steps in a row that are far off to the same side

 private:
  static constexpr int kBases = 4;  // DENSE, EXACT, predicted tiers, drafts
  static constexpr int kFeatures = kBases + 4;
  static constexpr int64_t kLearned = 8;
  static constexpr size_t kRecent = 16;  // steps of one kind that are remembered
  using Vector = std::array<double, kFeatures>;
  struct Step {
    StepShape shape;
    double ms = 0.0;
  };
  struct RecentSteps {
    std::array<Step, kRecent> steps;
    size_t count = 0;  // so far
  };
  static Vector Features(const StepShape& shape);
  void Fit(const StepShape& shape, double error);
  void ProjectOntoCosts();
  void BeginAnew();
  void Restart();
  double DearestBase() const;

  Vector weights_ = {};
  std::array<Vector, kFeatures> covariance_ = {};
  std::array<int64_t, kBases> seen_ = {};  // steps of each base
  double error_ms_ = 0.0;                  // mean absolute error, recent
  int64_t steps_ = 0;
  int far_off_ = 0;  // how many steps in a row were, and which: above 0 slow ones, below fast ones
  std::array<Step, kNewLevel> late_;
  std::array<std::array<RecentSteps, 2>, kBases> recent_;  // of each base, without prompt rows and with them
};

}  // namespace dejavu

#endif  // ENGINE_SCHEDULING_COST_MODEL_H_
