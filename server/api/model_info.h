// GetModelInfo: the sizes of the model that is served. Any thread.
#ifndef SERVER_API_MODEL_INFO_H_
#define SERVER_API_MODEL_INFO_H_

#include "absl/status/status.h"
#include "dejavu/v1/generation.pb.h"
#include "server/api/serving_state.h"

namespace dejavu {

absl::Status GetModelInfo(const ServingState& state, const v1::GetModelInfoRequest& request,
                          v1::GetModelInfoResponse* response);

}  // namespace dejavu

#endif  // SERVER_API_MODEL_INFO_H_
