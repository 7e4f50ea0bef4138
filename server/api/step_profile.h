// Profile and DumpTrace: what the engine's steps took, of those to come and of those that it remembers. Any thread.
#ifndef SERVER_API_STEP_PROFILE_H_
#define SERVER_API_STEP_PROFILE_H_

#include "absl/status/status.h"
#include "dejavu/v1/admin.pb.h"
#include "server/api/errands.h"
#include "server/api/serving_state.h"

namespace dejavu {

// Waits for the steps. An errand.
absl::Status Profile(const ServingState& state, const v1::ProfileRequest& request, PauseFunction pause,
                     v1::ProfileResponse* response);

absl::Status DumpTrace(const ServingState& state, const v1::DumpTraceRequest& request, v1::DumpTraceResponse* response);

}  // namespace dejavu

#endif  // SERVER_API_STEP_PROFILE_H_
