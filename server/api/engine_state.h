// GetEngineState: what operators see of the engine beyond GetServerInfo: live requests, each layer's sparsity. Any
// thread.
#ifndef SERVER_API_ENGINE_STATE_H_
#define SERVER_API_ENGINE_STATE_H_

#include "absl/status/status.h"
#include "dejavu/v1/admin.pb.h"
#include "server/api/serving_state.h"

namespace dejavu {

absl::Status GetEngineState(ServingState& state, const v1::GetEngineStateRequest& request,
                            v1::GetEngineStateResponse* response);

}  // namespace dejavu

#endif  // SERVER_API_ENGINE_STATE_H_
