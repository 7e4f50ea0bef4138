#include "server/api/abort.h"

#include "kernels/base/status_macros.h"
#include "server/api/validate.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"

namespace dejavu {
namespace {

absl::Status CheckAbort(const v1::AbortRequest& request) {
  if (request.request_id().empty()) return InvalidField("request_id", "is empty; name the request to end");
  return CheckRequestId(request.request_id());
}

absl::Status Reason() { return absl::CancelledError("the request was aborted"); }

}  // namespace

absl::Status AbortAny(ServingState& state, const v1::AbortRequest& request, v1::AbortResponse* response) {
  RETURN_IF_ERROR(CheckAbort(request));
  std::optional<std::string> tenant;
  if (request.has_tenant()) {
    ASSIGN_OR_RETURN(tenant, CheckTenant(request.tenant()));
  }
  ASSIGN_OR_RETURN(const bool found, state.live_requests().StopOfAny(request.request_id(), tenant, Reason()));
  response->set_found(found);
  return absl::OkStatus();
}

bool AbortOwn(ServingState& state, const std::string& tenant, const std::string& request_id) {
  return state.live_requests().Stop({state.knows_tenants() ? tenant : "", request_id}, Reason());
}

absl::Status AbortCall::OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) {
  v1::AbortRequest request;
  RETURN_IF_ERROR(ParseMessage(bytes, &request));
  RETURN_IF_ERROR(CheckAbort(request));
  if (request.has_tenant()) return InvalidField("tenant", "is for operators; a caller ends requests of its own");
  response_.set_found(AbortOwn(state_, rpc->tenant(), request.request_id()));
  return absl::OkStatus();
}

const google::protobuf::MessageLite* AbortCall::NextReply(std::optional<absl::Status>* end) {
  *end = absl::OkStatus();
  return &response_;
}

}  // namespace dejavu
