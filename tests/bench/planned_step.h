// PlannedStep: what the CUDA backend would launch for a decode step of a synthetic model, from its shape alone: no GPU,
// no memory for weights, nothing generated. One thread.
#ifndef TESTS_BENCH_PLANNED_STEP_H_
#define TESTS_BENCH_PLANNED_STEP_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/load/synthetic/densities.h"
#include "engine/load/synthetic/synthetic_model.h"
#include "engine/model/batch.h"
#include "engine/model/kv_cache.h"
#include "engine/model/opt_model.h"
#include "engine/model/opt_weights.h"
#include "engine/model/predictor.h"
#include "engine/model/shard.h"
#include "engine/sparsity.h"
#include "kernels/backend.h"
#include "kernels/communicator.h"
#include "kernels/cuda/launch_reads.h"
#include "tests/bench/launch_kinds.h"
#include "tests/bench/launch_trace.h"

namespace dejavu {

class PlannedStep {
 public:
  // `dtype` as ModelOptions::weights has it. For batches up to `slots`. INVALID_ARGUMENT for models that are not
  // synthetic.
  static absl::StatusOr<std::unique_ptr<PlannedStep>> Create(const std::string& model, const std::string& dtype,
                                                             int slots, int context);

  // By kind, with what is expected to be selected and not to be zero.
  std::vector<LaunchKind> Kinds(Tier tier, int batch);

  const OptConfig& config() const { return model_.config; }
  DType dtype() const { return weights_.dtype(); }

 private:
  explicit PlannedStep(SyntheticModel model, int context)
      : model_(std::move(model)), context_(context), shard_(*MakeShard(model_.config, nullptr, 0, 1)) {}
  absl::Status Make(DType dtype, int slots);

  const SyntheticModel model_;
  const int context_;
  const Shard shard_;
  std::unique_ptr<LaunchTrace> trace_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Communicator> alone_;
  OptWeights weights_;
  KvCache kv_;
  std::unique_ptr<Predictor> predictor_;
  std::unique_ptr<Batch> batch_;
  std::unique_ptr<OptModel> opt_;
  int32_t rank_ = 0;  // of the predictor
};

}  // namespace dejavu

#endif  // TESTS_BENCH_PLANNED_STEP_H_
