// GenerationService: the methods of dejavu.v1.GenerationService, each of which has a file of its own in this folder.
// Thin: check the request, hand it to the engine, send what the sink makes of its tokens.
#ifndef SERVER_API_GENERATION_SERVICE_H_
#define SERVER_API_GENERATION_SERVICE_H_

#include "server/api/serving_state.h"
#include "server/rpc/dispatcher.h"

namespace dejavu {

// Before the server starts. `state` must outlive its calls.
void RegisterGenerationService(ServingState* state, Dispatcher* dispatcher);

}  // namespace dejavu

#endif  // SERVER_API_GENERATION_SERVICE_H_
