#include "server/api/tokenize.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/api/validate.h"

namespace dejavu {
namespace {

// The input is limited, what becomes of it is not.
absl::Status CheckReplySize(const google::protobuf::MessageLite& reply) {
  const int64_t bytes = static_cast<int64_t>(reply.ByteSizeLong());
  if (bytes <= kMaxReplyBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the reply has ", bytes, " bytes; at most ", kMaxReplyBytes, " can be sent: split the request"));
}

}  // namespace

absl::Status Tokenize(const ServingState& state, const v1::TokenizeRequest& request, v1::TokenizeResponse* response) {
  ASSIGN_OR_RETURN(const std::vector<int32_t> ids, CheckTokenize(request, state.model()));
  response->mutable_token_ids()->Add(ids.begin(), ids.end());
  return CheckReplySize(*response);
}

absl::Status Detokenize(const ServingState& state, const v1::DetokenizeRequest& request,
                        v1::DetokenizeResponse* response) {
  ASSIGN_OR_RETURN(*response->mutable_text(), CheckDetokenize(request, state.model()));
  return CheckReplySize(*response);
}

}  // namespace dejavu
