#include "server/api/score_call.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dejavu/v1/generation.pb.h"
#include "kernels/base/status_macros.h"
#include "server/api/score_collector.h"
#include "server/api/validate.h"
#include "server/rpc/error_details.h"
#include "server/rpc/parse.h"

namespace dejavu {
namespace {

// All prompts wait at once, so that more than the queue's places would be refused for ever.
absl::Status CheckPlaces(const std::vector<Request>& prompts, const AdmissionOptions& options) {
  int32_t places = options.max_waiting_requests;
  if (prompts[0].urgency == Urgency::kBatch) places -= places / 4;
  if (options.tenant_max_waiting_requests > 0) places = std::min(places, options.tenant_max_waiting_requests);
  if (static_cast<int32_t>(prompts.size()) <= std::max(1, places)) return absl::OkStatus();
  return InvalidField("prompts",
                      absl::StrCat("has ", prompts.size(), " entries; the queue holds at most ", places, " of them"));
}

}  // namespace

absl::Status ScoreCall::Read(const Asking& asking, const grpc::ByteBuffer& bytes) {
  v1::ScoreRequest request;
  RETURN_IF_ERROR(ParseMessage(bytes, &request));
  Note(request);
  ASSIGN_OR_RETURN(std::vector<Request> checked, CheckScore(request, state().options(), state().model()));
  RETURN_IF_ERROR(CheckPlaces(checked, state().engine_options().admission));
  response_.set_request_id(asked().request_id);
  response_.set_model(state().model().name);
  asked().urgency = checked[0].urgency;
  asked().prompts = asked().samples = static_cast<int32_t>(checked.size());
  std::vector<std::shared_ptr<ReplySink>> sinks;
  int64_t tokens = 0;
  for (const Request& prompt : checked) {
    const auto collector = std::make_shared<ScoreCollector>(response_, asking.arrival, [asking] { asking.Wake(); });
    sinks.push_back(collector);
    if (!request.prompts().empty()) collectors_.push_back(collector);
    tokens += static_cast<int64_t>(prompt.prompt.size());
  }
  return Submit(std::move(checked), tokens, std::move(sinks), asking.rpc);
}

// The collectors keep their replies until all have ended.
const google::protobuf::MessageLite* ScoreCall::NextReply(std::optional<absl::Status>* end) {
  if (collectors_.empty()) return NextSinkReply(end);
  while (!end->has_value() && NextSinkReply(end) != nullptr) {
  }
  if (!end->has_value() || !(*end)->ok()) return nullptr;
  for (const auto& collector : collectors_) collector->MoveTo(response_.add_scores());
  return &response_;
}

void ScoreCall::ReleaseReply() {
  EngineCall::ReleaseReply();
  response_ = v1::ScoreResponse();
}

}  // namespace dejavu
