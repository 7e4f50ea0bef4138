// WeightPlan: which part of which stored tensor goes where in a rank's OptWeights. For OptWeights alone; one thread.
#ifndef ENGINE_MODEL_WEIGHT_PLAN_H_
#define ENGINE_MODEL_WEIGHT_PLAN_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/formats/checkpoint.h"
#include "engine/model/opt_config.h"
#include "engine/model/opt_weights.h"
#include "engine/model/shard.h"
#include "engine/model/weight_names.h"
#include "kernels/layout.h"
#include "kernels/tensor.h"

namespace dejavu {

// Where the own part of one stored tensor goes: to the rows of a region from `first_row` on, or, transposed, to all
// of it. A vector is a row, and `first_row` counts its elements.
struct WeightPlacement {
  const StoredTensor* source;  // nullptr: fill with `constant`
  Tensor* view;
  Runs rows, columns;  // own ones, as stored
  int64_t first_row = 0;
  bool transposed = false;
  float constant = 0.0f;
  Tensor* scale = nullptr;  // [1, rows of the view], for int8

  int64_t elements() const { return CountOf(rows) * CountOf(columns); }
};

class WeightPlan {
 public:
  WeightPlan(const Checkpoint& checkpoint, const OptConfig& config, const Shard& shard, std::optional<DType> dtype)
      : names_(checkpoint, config), config_(config), shard_(shard), dtype_(dtype) {}

  // Checks every tensor that the model needs and lays out `w`, which must outlive the plan. Once.
  absl::Status Make(OptWeights* w);

  DeviceLayout& layout() { return layout_; }
  const std::vector<WeightPlacement>& placements() const { return placements_; }
  int64_t source_bytes() const { return source_bytes_; }  // of all own parts, as stored

 private:
  static Runs All(int64_t count) { return {{0, static_cast<int32_t>(count)}}; }
  Runs HeadFeatures() const { return {{shard_.heads.first * config_.head_dim, shard_.heads.count * config_.head_dim}}; }
  DType TypeFor(DType stored, const Tensor* scale) const;
  absl::Status PlanMatrix(const std::string& name, int64_t rows, int64_t cols, const Runs& own, bool transposed,
                          Tensor* view, Tensor* scale);
  void PlaceMatrix(const StoredTensor& source, const Runs& own, bool transposed, Tensor* view, Tensor* scale);
  absl::Status PlanVector(const std::string& name, int64_t elements, const Runs& own, Tensor* view, int64_t first);
  absl::Status PlanLinear(const std::string& name, int64_t outputs, int64_t inputs, const Runs& own,
                          LinearWeights::Layout layout, LinearWeights* linear);
  absl::Status PlanQkv(const std::string& attention, LinearWeights* qkv);
  absl::Status PlanNorm(const std::string& name, NormWeights* norm);
  absl::Status PlanLayer(int32_t l, LayerWeights* layer);

  const WeightNames names_;
  const OptConfig& config_;
  const Shard& shard_;
  const std::optional<DType> dtype_;  // nothing: as stored
  DeviceLayout layout_;
  std::vector<WeightPlacement> placements_;
  int64_t source_bytes_ = 0;
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_WEIGHT_PLAN_H_
