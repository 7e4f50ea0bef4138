#include "server/api/engine_call.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/refusal.h"
#include "kernels/base/status_macros.h"
#include "kernels/base/utf8.h"
#include "server/api/load_report.h"
#include "server/api/validate.h"
#include "server/rpc/error_details.h"
#include "server/rpc/random.h"

namespace dejavu {
namespace {

// How long one whose id is taken waits for the end of a call that its client may have given up already. What is over
// for the client ends here within milliseconds; a busy machine needs more.
constexpr std::chrono::milliseconds kPatience(1000);

// The first `characters` of a prompt in text, which is valid UTF-8.
std::string Beginning(absl::string_view text, int characters) {
  size_t at = 0;
  for (; at < text.size() && characters > 0; --characters) at += FirstUtf8Step(text.substr(at)).length;
  return std::string(text.substr(0, at));
}

}  // namespace

EngineCall::~EngineCall() {
  if (!entered_) return;
  if (!released_) {
    StopEngine();  // the call was ended from outside: nobody hears what would follow
    Release();
  }
  state_.live_requests().Done();
}

absl::Status EngineCall::OnRequest(const Asking& asking, const grpc::ByteBuffer& bytes) {
  const absl::Status status = Read(asking, bytes);
  if (!status.ok()) CountRefused(status);
  return status;
}

std::string EngineCall::load_report(const std::string& tenant) { return LoadReportBytes(state_, tenant); }

void EngineCall::NoteEnd(const absl::Status& status) {
  const bool ours = absl::IsUnavailable(status) || absl::IsInternal(status) || absl::IsDataLoss(status) ||
                    (absl::IsResourceExhausted(status) && !asked().over_quota);
  if (ours) state_.load_meter().CountError(std::chrono::steady_clock::now());
}

void EngineCall::CountRefused(const absl::Status& status) {
  NoteEnd(status);
  const std::optional<RefusalInfo> refusal = RefusalOf(status);
  if (refusal.has_value() && refusal->reason.has_value()) return;  // the engine's
  const Refusal reason = asked().over_quota            ? Refusal::kQuotaExceeded
                         : absl::IsUnavailable(status) ? Refusal::kDraining
                                                       : Refusal::kInvalid;
  state_.model().engine->CountRefused(reason, std::max(1, asked().samples));
}

void EngineCall::OnCancel() {
  StopEngine();
  if (entered_) Release();  // else HandOver sees that it was stopped
}

google::protobuf::MessageLite* EngineCall::NextSinkReply(std::optional<absl::Status>* end) {
  if (waiting_.has_value()) {
    const absl::StatusOr<bool> goes_on = EndWaiting();
    if (!goes_on.ok()) {
      CountRefused(goes_on.status());
      *end = goes_on.status();
    }
    if (!goes_on.ok() || !*goes_on) return nullptr;
  }
  google::protobuf::MessageLite* reply = nullptr;
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
    // Before the client hears of the end: it may use the id again at once, and what its quotas have left.
    Release();
    record_->Settle();
    NoteEnd(**end);
  }
  return reply;
}

void EngineCall::ReleaseReply() {
  for (const auto& sink : sinks_) sink->ReleaseReply();
}

void EngineCall::Stop(const absl::Status& reason) {
  if (absl::IsUnavailable(reason)) record_->stopped = true;
  for (const auto& sink : sinks_) sink->SetCancelReason(reason);
  StopEngine();
}

absl::Status EngineCall::Submit(std::vector<Request> prompts, int64_t most_tokens,
                                std::vector<std::shared_ptr<ReplySink>> sinks, const std::shared_ptr<Rpc>& rpc) {
  ASSIGN_OR_RETURN(tenant_, CheckTenant(rpc->tenant()));
  for (Request& request : prompts) {
    request.deadline = std::min(request.deadline, rpc->deadline());
    request.tenant = tenant_;
  }
  most_tokens_ = most_tokens;
  key_ = {state_.knows_tenants() ? tenant_ : "", asked().request_id};
  sinks_ = std::move(sinks);  // before Stop can be called
  ended_.resize(sinks_.size());
  state_.live_requests().Enter();
  entered_ = true;
  // Once the id is found to be taken, NextReply may run at any moment: all that it needs is there before.
  waiting_ = Waiting();  // emplace() is not for clang 14: a nested type with an initializer
  waiting_->prompts = std::move(prompts);
  waiting_->rpc = rpc;
  waiting_->until = std::chrono::steady_clock::now() + kPatience;
  if (!TakeId(rpc).ok()) return absl::OkStatus();
  prompts = std::move(waiting_->prompts);
  waiting_.reset();
  return HandOver(std::move(prompts));
}

absl::Status EngineCall::TakeId(const std::shared_ptr<Rpc>& rpc) {
  return state_.live_requests().Add(key_, tenant_, this, [weak = std::weak_ptr<Rpc>(rpc)] {
    if (const std::shared_ptr<Rpc> waits = weak.lock()) waits->Wake();
  });
}

absl::Status EngineCall::TakeQuota() {
  if (!state_.knows_tenants()) return absl::OkStatus();
  const SteadyTime now = std::chrono::steady_clock::now();
  const absl::Status status = state_.quotas()->Take(tenant_, state_.LimitsOf(tenant_), most_tokens_, now);
  asked().over_quota = !status.ok();
  if (!status.ok()) return status;
  record_->lease = std::make_unique<QuotaLease>(state_.quotas(), tenant_, most_tokens_);
  MutexLock lock(mutex_);
  lease_ = record_->lease.get();
  return absl::OkStatus();
}

// All, or none: where one is refused, those before it end, and those behind it are refused, too.
absl::StatusOr<std::vector<uint64_t>> EngineCall::SubmitAll(std::vector<Request> prompts) {
  Engine& engine = *state_.model().engine;
  const size_t samples = sinks_.size() / prompts.size();
  std::vector<uint64_t> ids;
  for (Request& prompt : prompts) {
    const auto first = sinks_.begin() + static_cast<ptrdiff_t>(ids.size());
    const absl::StatusOr<uint64_t> id =
        engine.SubmitSamples(std::move(prompt), {first, first + static_cast<ptrdiff_t>(samples)});
    if (!id.ok()) {
      for (const uint64_t taken : ids) engine.Cancel(taken);
      const std::optional<RefusalInfo> refusal = RefusalOf(id.status());
      const auto left = static_cast<int>(sinks_.size() - ids.size() - samples);
      if (left > 0) engine.CountRefused(refusal->reason.value_or(Refusal::kInvalid), left);
      return id.status();
    }
    for (size_t i = 0; i < samples; ++i) ids.push_back(*id + i);
  }
  return ids;
}

absl::StatusOr<std::vector<uint64_t>> EngineCall::Begin(std::vector<Request> prompts) {
  RETURN_IF_ERROR(TakeQuota());
  record_->sinks = sinks_;  // before they have an end to tell of
  absl::StatusOr<std::vector<uint64_t>> ids = SubmitAll(std::move(prompts));
  if (ids.ok()) return ids;
  record_->sinks.clear();
  if (record_->lease != nullptr) record_->lease->Settle(0, /*taken=*/false);
  return ids;
}

absl::Status EngineCall::HandOver(std::vector<Request> prompts) {
  const absl::StatusOr<std::vector<uint64_t>> ids = Begin(std::move(prompts));
  bool stopped = false;
  if (ids.ok()) {
    MutexLock lock(mutex_);
    engine_ids_ = *ids;
    stay_ = LoadMeter::Stay(&state_.load_meter(), std::max(1, asked().samples));
    stopped = stop_;
    if (stop_) CancelAll();
  }
  // The client has gone, or will hear of a refusal next.
  if (stopped || !ids.ok()) Release();
  return ids.status();
}

absl::StatusOr<bool> EngineCall::EndWaiting() {
  const std::shared_ptr<Rpc> rpc = waiting_->rpc.lock();
  if (rpc == nullptr) return false;  // it is over
  const absl::Status taken = TakeId(rpc);
  if (taken.ok()) {
    std::vector<Request> prompts = std::move(waiting_->prompts);
    waiting_.reset();
    RETURN_IF_ERROR(HandOver(std::move(prompts)));
    return true;
  }
  const bool stopped = state_.phase() == Phase::kStopped;
  if (stopped || std::chrono::steady_clock::now() >= waiting_->until) {
    Release();
    return stopped ? ServerStopped() : taken;
  }
  if (!waiting_->timed) {
    waiting_->timed = true;
    const auto left = waiting_->until - std::chrono::steady_clock::now();
    waiting_->alarm.Set(std::chrono::system_clock::now() + left, [weak = waiting_->rpc](bool) {
      if (const std::shared_ptr<Rpc> waits = weak.lock()) waits->Wake();
    });
  }
  return false;
}

void EngineCall::Release() {
  state_.live_requests().Remove(key_, this);
  released_ = true;
  MutexLock lock(mutex_);
  if (lease_ != nullptr) lease_->End();
  stay_ = {};
}

void EngineCall::NoteAsked(const std::string& request_id, absl::string_view text) {
  asked().request_id = request_id.empty() ? absl::StrCat("req-", RandomHex(16)) : request_id;
  asked().prompt_text = Beginning(text, state_.options().log_prompt_chars);
}

void EngineCall::StopEngine() {
  MutexLock lock(mutex_);
  stop_ = true;
  CancelAll();
}

void EngineCall::CancelAll() {
  for (const uint64_t id : engine_ids_) state_.model().engine->Cancel(id);
}

}  // namespace dejavu
