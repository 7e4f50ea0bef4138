// DraftWeights: what the steps that draft are computed with. A draft of a predicted tier reads few neurons, and all of
// the attention's projections and of the head over the vocabulary; those are here once more, in int8, and the rest is
// the model's. A draft is checked, so that no token depends on it. One thread makes them; immutable then.
#ifndef ENGINE_MODEL_DRAFT_WEIGHTS_H_
#define ENGINE_MODEL_DRAFT_WEIGHTS_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "engine/load_progress.h"
#include "engine/model/opt_config.h"
#include "engine/model/opt_weights.h"
#include "engine/model/shard.h"
#include "kernels/backend.h"

namespace dejavu {

class DraftWeights {
 public:
  // From `weights`, on their device; they must outlive it, and are not int8.
  // CANCELLED where `progress`, in bytes of int8, says so.
  static absl::StatusOr<std::unique_ptr<DraftWeights>> Create(const OptWeights& weights, Backend& backend,
                                                              const LoadProgress& progress = nullptr);

  // What Create takes of the device.
  static int64_t Measure(const OptConfig& config, const Shard& shard);

  const OptWeights& weights() const { return weights_; }
  int64_t bytes() const { return storage_.bytes(); }

 private:
  DraftWeights() = default;

  OptWeights weights_;  // views: of storage_, and of the model's own
  Buffer storage_;
};

}  // namespace dejavu

#endif  // ENGINE_MODEL_DRAFT_WEIGHTS_H_
