#include "server/api/score_call.h"

#include <utility>

#include "dejavu/v1/generation.pb.h"
#include "kernels/base/status_macros.h"
#include "server/api/score_collector.h"
#include "server/api/validate.h"
#include "server/rpc/parse.h"

namespace dejavu {

absl::Status ScoreCall::Read(const Asking& asking, const grpc::ByteBuffer& bytes) {
  v1::ScoreRequest request;
  RETURN_IF_ERROR(ParseMessage(bytes, &request));
  Note(request);
  ASSIGN_OR_RETURN(Request checked, CheckScore(request, state().options(), state().model()));
  v1::ScoreResponse response;
  response.set_request_id(asked().request_id);
  response.set_model(state().model().name);
  asked().urgency = checked.urgency;
  asked().samples = 1;
  auto collector = std::make_shared<ScoreCollector>(std::move(response), asking.arrival, [asking] { asking.Wake(); });
  const auto tokens = static_cast<int64_t>(checked.prompt.size());
  return Submit(std::move(checked), tokens, {std::move(collector)}, asking.rpc);
}

}  // namespace dejavu
