// Vllm: vllm.grpc.engine.VllmEngine, by which the SMG gateway makes an OpenAI server of this one.
#ifndef SERVER_API_VLLM_SERVICE_H_
#define SERVER_API_VLLM_SERVICE_H_

#include "server/api/health.h"
#include "server/api/serving_state.h"
#include "server/rpc/dispatcher.h"

namespace dejavu {

// Before the server starts. `state` and `health`, which says whether the server is ready, must outlive its calls.
void RegisterVllm(ServingState* state, const Health* health, Dispatcher* dispatcher);

}  // namespace dejavu

#endif  // SERVER_API_VLLM_SERVICE_H_
