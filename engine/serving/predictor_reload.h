// A predictor that is read again while the engine serves: a caller reads it, and the engine thread swaps it in between
// two steps (Inbox::Swap).
#ifndef ENGINE_SERVING_PREDICTOR_RELOAD_H_
#define ENGINE_SERVING_PREDICTOR_RELOAD_H_

#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/opt_config.h"
#include "engine/model/predictor_file.h"
#include "engine/ranks/model_group.h"
#include "engine/sparsity.h"

namespace dejavu {

struct PredictorReload {
  PredictorData data;
  std::optional<absl::Status> result;  // guarded by the inbox's mutex
};

// The file of the loaded predictor, as it is now. Its errors are those of Engine::ReloadPredictor. Any thread.
absl::StatusOr<PredictorData> ReadPredictorAgain(const ModelGroup& group, const PredictorInfo& loaded,
                                                 const OptConfig& config);

}  // namespace dejavu

#endif  // ENGINE_SERVING_PREDICTOR_RELOAD_H_
