// Abort: ends a request that is under way, by its id; for tenants (Abort) and operators (AbortRequest). Any thread.
#ifndef SERVER_API_ABORT_H_
#define SERVER_API_ABORT_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "dejavu/v1/generation.pb.h"
#include "server/api/serving_state.h"
#include "server/rpc/rpc.h"

namespace dejavu {

// Anybody's request; where several tenants have one of that id, the one of the tenant that is named.
absl::Status AbortAny(ServingState& state, const v1::AbortRequest& request, v1::AbortResponse* response);

// The tenant's own request of that id, where tokens say whose a call is; else anybody's. False: there is none.
bool AbortOwn(ServingState& state, const std::string& tenant, const std::string& request_id);

// With tokens the caller's own requests alone: those of others are as good as not there. Without tokens a tenant is
// only what a caller says, and the request may be anybody's.
class AbortCall final : public RpcHandler {
 public:
  explicit AbortCall(ServingState* state) : state_(*state) {}

  absl::Status OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) override;
  const google::protobuf::MessageLite* NextReply(std::optional<absl::Status>* end) override;

 private:
  ServingState& state_;
  v1::AbortResponse response_;
};

}  // namespace dejavu

#endif  // SERVER_API_ABORT_H_
