#include "server/api/engine_call.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"
#include "server/api/validate.h"
#include "server/rpc/random.h"

namespace dejavu {
namespace {

// The first `characters` of a prompt in text, which is valid UTF-8.
std::string Beginning(absl::string_view text, int characters) {
  size_t at = 0;
  for (; at < text.size() && characters > 0; --characters) at += FirstUtf8Step(text.substr(at)).length;
  return std::string(text.substr(0, at));
}

}  // namespace

EngineCall::~EngineCall() {
  if (live_id_.empty()) return;
  if (!released_) state_.live_requests().Remove(live_id_);
  state_.live_requests().Done();
}

const google::protobuf::MessageLite* EngineCall::NextReply(std::optional<absl::Status>* end) {
  const google::protobuf::MessageLite* reply = nullptr;
  for (size_t i = 0; i < sinks_.size() && reply == nullptr && !end->has_value(); ++i) {
    if (ended_[i]) continue;
    std::optional<absl::Status> sink_end;
    reply = sinks_[i]->NextReply(&sink_end);
    if (!sink_end.has_value()) continue;
    ended_[i] = true;
    ++ends_;
    if (!sink_end->ok() || ends_ == sinks_.size()) *end = std::move(sink_end);
  }
  if (end->has_value() && !released_) {
    if (ends_ < sinks_.size()) StopEngine();
    // Before the client hears of the end: it may use the id again at once.
    state_.live_requests().Remove(live_id_);
    released_ = true;
  }
  return reply;
}

void EngineCall::ReleaseReply() {
  for (const auto& sink : sinks_) sink->ReleaseReply();
}

void EngineCall::Stop(const absl::Status& reason) {
  for (const auto& sink : sinks_) sink->SetCancelReason(reason);
  StopEngine();
}

absl::Status EngineCall::Submit(Request request, std::vector<std::shared_ptr<ReplySink>> sinks, const Rpc& rpc) {
  request.deadline = rpc.deadline();
  ASSIGN_OR_RETURN(request.tenant, CheckTenant(rpc.tenant()));
  sinks_ = std::move(sinks);  // before Stop can be called
  ended_.resize(sinks_.size());
  RETURN_IF_ERROR(state_.live_requests().Add(asked().request_id, request.tenant, this));
  live_id_ = asked().request_id;
  ASSIGN_OR_RETURN(const uint64_t engine_id,
                   state_.model().engine->SubmitSamples(std::move(request), {sinks_.begin(), sinks_.end()}));
  record_->sinks = sinks_;
  MutexLock lock(mutex_);
  engine_id_ = engine_id;
  if (stop_) CancelAll();
  return absl::OkStatus();
}

void EngineCall::NoteAsked(const std::string& request_id, absl::string_view text) {
  asked().request_id = request_id.empty() ? absl::StrCat("req-", RandomHex(16)) : request_id;
  asked().prompt_text = Beginning(text, state_.options().log_prompt_chars);
}

void EngineCall::StopEngine() {
  MutexLock lock(mutex_);
  stop_ = true;
  if (engine_id_ != 0) CancelAll();
}

void EngineCall::CancelAll() {
  for (size_t i = 0; i < sinks_.size(); ++i) state_.model().engine->Cancel(engine_id_ + i);
}

}  // namespace dejavu
