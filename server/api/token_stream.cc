#include "server/api/token_stream.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "server/api/sparsity_messages.h"
#include "server/api/speculation_messages.h"
#include "server/rpc/error_details.h"

namespace dejavu {

TokenStream::TokenStream(TokenStreamOptions options, std::function<void()> wake)
    : options_(std::move(options)),
      wake_(std::move(wake)),
      stop_matcher_(options_.stop_strings, options_.include_stop_string) {
  if (options_.tokenizer != nullptr) {
    detokenizer_.emplace(*options_.tokenizer, /*skip_special_tokens=*/true);
    detokenizer_->Prime(options_.prompt_tail);
  }
  *pending_.mutable_prompt() = options_.prompt;
  has_pending_ = true;
}

bool TokenStream::OnToken(const Token& token) {
  {
    MutexLock lock(mutex_);
    const size_t text_before = pending_.text().size();
    pending_.add_token_ids(static_cast<uint32_t>(token.id));
    ++tokens_;
    if (token.has_logprob) FillLogprobs(token, pending_.add_logprobs());
    if (detokenizer_.has_value() && !token.stop) AppendText(token.id);
    has_pending_ = true;

    const size_t logprob_bytes = token.has_logprob ? 12 + 12 * token.top.size() : 0;
    pending_bytes_ += static_cast<int64_t>(pending_.text().size() - text_before + 4 + logprob_bytes);
    if (options_.streaming && pending_bytes_ > options_.max_outbox_bytes) {
      overflowed_ = true;  // the client does not read; what waits for it is of no use without what would follow
      pending_.Clear();
      scores_ = PromptScores();
      has_pending_ = false;
    }
    if (overflowed_ || matched_stop_ >= 0) return false;  // OnFinish comes next
  }
  if (options_.streaming) wake_();
  return true;
}

bool TokenStream::OnPromptToken(const Token& token) {
  {
    MutexLock lock(mutex_);
    scores_.Add(token);
    has_pending_ = true;
  }
  if (options_.streaming) wake_();
  return true;
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
      MatchStopToken(finish);
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
  MatchStops();
}

void TokenStream::MatchStops() {
  matched_stop_ = stop_matcher_.Append(token_text_, tokens_ > options_.min_new_tokens, pending_.mutable_text());
}

// Bytes of an unfinished character become U+FFFD, which may still complete a stop string.
void TokenStream::FlushText() {
  if (!detokenizer_.has_value() || matched_stop_ >= 0) return;
  token_text_.clear();
  detokenizer_->Flush(&token_text_);
  MatchStops();
  if (matched_stop_ < 0) stop_matcher_.Flush(pending_.mutable_text());
}

// The end token ends a request as it always does, whatever its stop strings are.
void TokenStream::MatchStopToken(const dejavu::Finish& finish) {
  if (matched_stop_ >= 0 || finish.reason != FinishReason::kStopToken) return;
  const auto& stops = options_.special_stops;
  const auto stop = std::find(stops.begin(), stops.end(), finish.stop_token_id);
  if (stop == stops.end()) return;
  matched_stop_ = static_cast<int>(stop - stops.begin());
  if (options_.include_stop_string) pending_.mutable_text()->append(options_.stop_strings[matched_stop_]);
}

void TokenStream::FillFinish(const dejavu::Finish& finish) {
  v1::Finish* message = pending_.mutable_finish();
  message->set_prompt_tokens(static_cast<uint32_t>(finish.prompt_tokens));
  message->set_generated_tokens(static_cast<uint32_t>(finish.generated_tokens));
  FillTimings(finish, options_.arrival, message->mutable_timings());
  FillReport(finish.sparsity, message->mutable_sparsity());
  if (finish.speculation.rounds > 0) FillReport(finish.speculation, message->mutable_speculation());
  message->set_cached_prompt_tokens(static_cast<uint32_t>(finish.cached_prompt_tokens));
  message->set_saturated_kv_values(static_cast<uint64_t>(finish.saturated_kv_values));
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

google::protobuf::MessageLite* TokenStream::NextReply(std::optional<absl::Status>* end) {
  PromptScores scores;
  {
    MutexLock lock(mutex_);
    *end = end_;
    const bool partial = !end_.has_value();
    const bool failed = end_.has_value() && !end_->ok();
    if (!has_pending_ || (!options_.streaming && (partial || failed))) return nullptr;
    sent_.Clear();
    sent_.Swap(&pending_);  // both keep their memory
    sent_.set_sample(options_.sample);
    std::swap(scores, scores_);
    has_pending_ = false;
    pending_bytes_ = 0;
  }
  scores.AppendTo(sent_.mutable_prompt_logprobs());
  return &sent_;
}

void TokenStream::ReleaseReply() {
  v1::GenerateChunk pending, sent;  // freed after the lock
  MutexLock lock(mutex_);
  pending.Swap(&pending_);
  sent.Swap(&sent_);
}

}  // namespace dejavu
