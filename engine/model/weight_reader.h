// WeightReader: reads the files of a WeightPlan, stripe by stripe, into the places that it gives. For OptWeights alone;
// one thread.
#ifndef ENGINE_MODEL_WEIGHT_READER_H_
#define ENGINE_MODEL_WEIGHT_READER_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/model/opt_weights.h"
#include "engine/model/weight_plan.h"
#include "kernels/backend.h"

namespace dejavu {

class WeightReader {
 public:
  WeightReader(const WeightPlan& plan, Backend& backend, const LoadProgress& progress)
      : plan_(plan), backend_(backend), progress_(progress) {}

  absl::Status Read();

 private:
  absl::Status ReadVector(const WeightPlacement& placement);
  absl::Status ReadMatrix(const WeightPlacement& placement);
  // Calls `use`(first row, rows) for each stripe of the own rows, whose own columns then lie in stripe_, as stored.
  template <typename Use>
  absl::Status ForStripes(const WeightPlacement& placement, const Use& use);
  absl::Status Convert(const WeightPlacement& placement, int64_t first, int64_t rows);
  absl::Status ReadColumnScales(const WeightPlacement& placement);
  absl::Status Advance(int64_t bytes);

  const WeightPlan& plan_;
  Backend& backend_;
  const LoadProgress& progress_;
  int64_t done_bytes_ = 0;
  std::vector<char> stripe_, converted_, transposed_;
  std::vector<float> wide_, scales_, inverses_;
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_WEIGHT_READER_H_
