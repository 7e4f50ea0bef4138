#include "server/api/token_stream.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "server/api/sparsity_messages.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

void FillTimings(const Finish& finish, SteadyTime arrival, v1::Timings* timings) {
  timings->set_queue_ms(Milliseconds(arrival, finish.scheduled));
  timings->set_ttft_ms(Milliseconds(arrival, finish.first_token));
  timings->set_total_ms(Milliseconds(arrival, finish.finished));
  if (finish.generated_tokens > 1) {
    timings->set_mean_itl_ms(Milliseconds(finish.first_token, finish.finished) / (finish.generated_tokens - 1));
  }
}

absl::string_view ReasonName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kLength:
      return "length";
    case FinishReason::kTime:
      return "time";
    case FinishReason::kEos:
      return "eos";
    case FinishReason::kStopToken:
      return "stop_token";
    case FinishReason::kSink:
      return "stop_string";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kDeadline:
      return "deadline";
    case FinishReason::kShutdown:
      return "shutdown";
    case FinishReason::kError:
      return "error";
  }
  return "error";
}

// Works for TokenLogprobs and ScoredToken.
template <typename Message>
void FillLogprobs(const Token& token, Message* message) {
  if (token.has_logprob) {
    message->set_logprob(token.logprob);
    message->set_rank(static_cast<uint32_t>(token.rank));
  }
  for (const TokenLogprob& alternative : token.top) {
    v1::TokenLogprob* top = message->add_top();
    top->set_id(static_cast<uint32_t>(alternative.id));
    top->set_logprob(alternative.logprob);
  }
}

}  // namespace

void ReplySink::SetCancelReason(absl::Status reason) {
  MutexLock lock(mutex_);
  if (cancel_reason_.ok()) cancel_reason_ = std::move(reason);
}

std::optional<EngineOutcome> ReplySink::outcome() {
  MutexLock lock(mutex_);
  return outcome_;
}

absl::Status ReplySink::EndStatus(const Finish& finish) {
  switch (finish.reason) {
    case FinishReason::kLength:
    case FinishReason::kTime:
    case FinishReason::kEos:
    case FinishReason::kStopToken:
    case FinishReason::kSink:
      return absl::OkStatus();
    case FinishReason::kCancelled:
      return cancel_reason_.ok() ? absl::CancelledError("the request was cancelled") : cancel_reason_;
    case FinishReason::kDeadline:
      return absl::DeadlineExceededError(
          absl::StrCat("the deadline passed after ", finish.generated_tokens, " generated tokens"));
    case FinishReason::kShutdown:
      return StoppedBeforeDone();
    case FinishReason::kError:
      if (finish.status.ok()) return absl::InternalError("the engine ended the request without a reason");
      if (absl::IsUnavailable(finish.status)) return UnavailableRetry(finish.status.message(), std::chrono::seconds(1));
      return finish.status;
  }
  return absl::InternalError("unknown finish reason");
}

TokenStream::TokenStream(TokenStreamOptions options, std::function<void()> wake)
    : options_(std::move(options)),
      wake_(std::move(wake)),
      stop_matcher_(options_.stop_strings, options_.include_stop_string) {
  if (options_.tokenizer != nullptr) detokenizer_.emplace(*options_.tokenizer, /*skip_special_tokens=*/true);
  *pending_.mutable_prompt() = options_.prompt;
  has_pending_ = true;
}

bool TokenStream::OnToken(const Token& token) {
  {
    MutexLock lock(mutex_);
    const size_t text_before = pending_.text().size();
    pending_.add_token_ids(static_cast<uint32_t>(token.id));
    if (token.has_logprob) FillLogprobs(token, pending_.add_logprobs());
    if (detokenizer_.has_value() && !token.stop) AppendText(token.id);
    has_pending_ = true;

    const size_t logprob_bytes = token.has_logprob ? 12 + 12 * token.top.size() : 0;
    pending_bytes_ += static_cast<int64_t>(pending_.text().size() - text_before + 4 + logprob_bytes);
    if (options_.streaming && pending_bytes_ > options_.max_outbox_bytes) {
      overflowed_ = true;  // the client does not read; what waits for it is of no use without what would follow
      pending_.Clear();
      has_pending_ = false;
    }
    if (overflowed_ || matched_stop_ >= 0) return false;  // OnFinish comes next
  }
  if (options_.streaming) wake_();
  return true;
}

bool TokenStream::OnPromptToken(const Token& /*token*/) {
  CHECK(false) << "a generation request got the log-probability of a prompt token";
  return false;
}

void TokenStream::OnFinish(const dejavu::Finish& finish) {
  {
    MutexLock lock(mutex_);
    absl::Status status = EndStatus(finish);
    if (overflowed_) {
      status = QuotaExceeded("max_outbox_bytes",
                             absl::StrCat("the client reads too slowly: more than ", options_.max_outbox_bytes,
                                          " bytes of output were waiting for it"),
                             std::chrono::seconds(1));
    }
    if (status.ok()) {
      FlushText();
      FillFinish(finish);
      has_pending_ = true;
    }
    // A last token may have completed a stop string in FlushText.
    outcome_ = {finish, overflowed_ ? "error" : matched_stop_ >= 0 ? "stop_string" : ReasonName(finish.reason)};
    end_ = std::move(status);
  }
  wake_();
}

void TokenStream::AppendText(int32_t id) {
  token_text_.clear();
  detokenizer_->Append(id, &token_text_);
  matched_stop_ = stop_matcher_.Append(token_text_, pending_.mutable_text());
}

// Bytes of an unfinished character become U+FFFD, which may still complete a stop string.
void TokenStream::FlushText() {
  if (!detokenizer_.has_value() || matched_stop_ >= 0) return;
  token_text_.clear();
  detokenizer_->Flush(&token_text_);
  matched_stop_ = stop_matcher_.Append(token_text_, pending_.mutable_text());
  if (matched_stop_ < 0) stop_matcher_.Flush(pending_.mutable_text());
}

void TokenStream::FillFinish(const dejavu::Finish& finish) {
  v1::Finish* message = pending_.mutable_finish();
  message->set_prompt_tokens(static_cast<uint32_t>(finish.prompt_tokens));
  message->set_generated_tokens(static_cast<uint32_t>(finish.generated_tokens));
  FillTimings(finish, options_.arrival, message->mutable_timings());
  FillReport(finish.sparsity, message->mutable_sparsity());
  message->set_cached_prompt_tokens(static_cast<uint32_t>(finish.cached_prompt_tokens));
  if (matched_stop_ >= 0) {
    message->set_reason(v1::FINISH_REASON_STOP_STRING);
    message->set_stop_string(options_.stop_strings[matched_stop_]);
    return;
  }
  if (finish.reason == FinishReason::kLength) {
    message->set_reason(v1::FINISH_REASON_LENGTH);
    return;
  }
  if (finish.reason == FinishReason::kTime) {
    message->set_reason(v1::FINISH_REASON_MAX_TIME);
    return;
  }
  CHECK(finish.reason == FinishReason::kEos || finish.reason == FinishReason::kStopToken)
      << "the sink ended the request without a stop string";
  message->set_reason(finish.reason == FinishReason::kEos ? v1::FINISH_REASON_EOS : v1::FINISH_REASON_STOP_TOKEN);
  message->set_stop_token_id(static_cast<uint32_t>(finish.stop_token_id));
}

const google::protobuf::MessageLite* TokenStream::NextReply(std::optional<absl::Status>* end) {
  MutexLock lock(mutex_);
  *end = end_;
  const bool partial = !end_.has_value();
  const bool failed = end_.has_value() && !end_->ok();
  if (!has_pending_ || (!options_.streaming && (partial || failed))) return nullptr;
  sent_.Clear();
  sent_.Swap(&pending_);  // both keep their memory
  sent_.set_sample(options_.sample);
  has_pending_ = false;
  pending_bytes_ = 0;
  return &sent_;
}

ScoreCollector::ScoreCollector(v1::ScoreResponse response, SteadyTime arrival, std::function<void()> wake)
    : arrival_(arrival), wake_(std::move(wake)), response_(std::move(response)) {}

bool ScoreCollector::OnToken(const Token& /*token*/) {
  CHECK(false) << "a score request generated a token";
  return false;
}

bool ScoreCollector::OnPromptToken(const Token& token) {
  MutexLock lock(mutex_);
  v1::ScoredToken* scored = response_.add_tokens();
  scored->set_id(static_cast<uint32_t>(token.id));
  FillLogprobs(token, scored);
  return true;
}

void ScoreCollector::OnFinish(const dejavu::Finish& finish) {
  {
    MutexLock lock(mutex_);
    end_ = EndStatus(finish);
    outcome_ = {finish, ReasonName(finish.reason)};
    if (end_->ok()) FillTimings(finish, arrival_, response_.mutable_timings());
  }
  wake_();
}

const google::protobuf::MessageLite* ScoreCollector::NextReply(std::optional<absl::Status>* end) {
  MutexLock lock(mutex_);
  *end = end_;
  return end_.has_value() && end_->ok() ? &response_ : nullptr;  // nothing changes it after OnFinish
}

}  // namespace dejavu
