// CostModel: how long a step takes, learned from the steps just run.
//
//   ms = base of the dearest tier in the step + row * decode rows + prefill_token * prompt rows + context_token *
//   context
//
// fitted by recursive least squares with forgetting (Haykin, Adaptive Filter Theory, 4th ed., 9.3), with coefficients
// that count as zero where they are negative. Pure arithmetic, nothing allocates. Engine thread only.
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
};

class CostModel {
 public:
  CostModel();
  // A simulator's truth, or a start from an earlier run; counts as learned.
  explicit CostModel(const CostParameters& known);

  void Observe(const StepShape& shape, double ms);
  double Predict(const StepShape& shape) const;
  CostParameters parameters() const;
  // Predictions before that many steps are guesses.
  bool learned() const { return steps_ >= kLearned; }
  int64_t steps() const { return steps_; }

 private:
  static constexpr int kFeatures = 6;
  static constexpr int64_t kLearned = 8;
  using Vector = std::array<double, kFeatures>;
  static Vector Features(const StepShape& shape);

  Vector weights_ = {};
  std::array<Vector, kFeatures> covariance_ = {};
  std::array<int64_t, 3> seen_ = {};  // steps of each base
  double error_ms_ = 0.0;             // mean absolute error, recent
  int64_t steps_ = 0;
};

}  // namespace dejavu

#endif  // ENGINE_SCHEDULING_COST_MODEL_H_
