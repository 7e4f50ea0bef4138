// What a request must be to run on a model at all. Any thread.
#ifndef ENGINE_SERVING_CHECK_REQUEST_H_
#define ENGINE_SERVING_CHECK_REQUEST_H_

#include "absl/status/status.h"
#include "engine/model_shape.h"
#include "engine/request.h"
#include "engine/sparsity.h"

namespace dejavu {

// INVALID_ARGUMENT for a request that can never run.
absl::Status CheckRequest(const Request& request, const ModelShape& shape);

// FAILED_PRECONDITION for a tier that the loaded predictor cannot serve.
absl::Status CheckTier(Tier tier, const PredictorInfo& predictor);

}  // namespace dejavu

#endif  // ENGINE_SERVING_CHECK_REQUEST_H_
