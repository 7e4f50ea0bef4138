// GetServerInfo: what the server is, what it allows, and how busy it is. Any thread.
#ifndef SERVER_API_SERVER_INFO_H_
#define SERVER_API_SERVER_INFO_H_

#include <string>

#include "absl/status/status.h"
#include "dejavu/v1/generation.pb.h"
#include "server/api/serving_state.h"

namespace dejavu {

// For operators and the status page. While the model is loading it lacks what only an engine knows.
v1::GetServerInfoResponse ServerInfo(const ServingState& state);

// PERMISSION_DENIED where tokens say that the caller is no operator: what others do is not told to tenants.
absl::Status CheckMayKnowLoad(const ServingState& state, const std::string& tenant);

// Where tokens are known, a tenant is told of itself and not of others; the operators' is told all.
absl::Status GetServerInfo(const ServingState& state, const std::string& tenant,
                           const v1::GetServerInfoRequest& request, v1::GetServerInfoResponse* response);

}  // namespace dejavu

#endif  // SERVER_API_SERVER_INFO_H_
