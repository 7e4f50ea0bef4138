#include "server/api/abort.h"

#include "kernels/base/status_macros.h"
#include "server/api/validate.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"

namespace dejavu {
namespace {

// `owner`: the tenant whose requests alone may be ended; none: anybody's.
absl::Status Abort(ServingState& state, const v1::AbortRequest& request, const std::optional<std::string>& owner,
                   v1::AbortResponse* response) {
  if (request.request_id().empty()) return InvalidField("request_id", "is empty; name the request to end");
  RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  const absl::Status reason = absl::CancelledError("the request was aborted");
  ASSIGN_OR_RETURN(const bool found, state.live_requests().Stop(request.request_id(), owner, reason));
  response->set_found(found);
  return absl::OkStatus();
}

}  // namespace

absl::Status AbortAny(ServingState& state, const v1::AbortRequest& request, v1::AbortResponse* response) {
  return Abort(state, request, /*owner=*/std::nullopt, response);
}

absl::Status AbortCall::OnRequest(const std::shared_ptr<Rpc>& rpc, const grpc::ByteBuffer& bytes) {
  v1::AbortRequest request;
  RETURN_IF_ERROR(ParseMessage(bytes, &request));
  if (state_.options().auth_tokens_file.empty()) return AbortAny(state_, request, &response_);
  return Abort(state_, request, rpc->tenant(), &response_);
}

const google::protobuf::MessageLite* AbortCall::NextReply(std::optional<absl::Status>* end) {
  *end = absl::OkStatus();
  return &response_;
}

}  // namespace dejavu
