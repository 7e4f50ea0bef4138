// KServe: inference.GRPCInferenceService, the Open Inference Protocol with Triton's extensions. Generations are
// GenerateCalls; what stock clients ask beside them is answered, or refused as a Triton that was built or started
// without it does.
#ifndef SERVER_API_KSERVE_SERVICE_H_
#define SERVER_API_KSERVE_SERVICE_H_

#include "server/api/health.h"
#include "server/api/serving_state.h"
#include "server/rpc/dispatcher.h"

namespace dejavu {

// Before the server starts. `state` and `health`, which says whether the server is ready, must outlive its calls.
void RegisterKServe(ServingState* state, const Health* health, Dispatcher* dispatcher);

}  // namespace dejavu

#endif  // SERVER_API_KSERVE_SERVICE_H_
