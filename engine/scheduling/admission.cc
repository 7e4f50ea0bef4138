#include "engine/scheduling/admission.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace dejavu {
namespace {

constexpr double kLeastRetryMs = 100.0, kMostRetryMs = 30e3;

absl::Status CannotMeet(const Request& request, double needed_ms, double left_ms) {
  return absl::DeadlineExceededError(absl::StrCat(
      "the request would take about ", std::ceil(needed_ms), " ms and its deadline leaves ",
      std::max(0.0, std::floor(left_ms)), " ms; ask for fewer than ", request.max_new_tokens, " tokens or more time"));
}

}  // namespace

absl::Status Admission::Refuse(Refusal refusal, absl::Status status, std::chrono::milliseconds retry_after,
                               int samples) {
  CountRefused(refusal, samples);
  return WithRefusal(std::move(status), {refusal, retry_after});
}

void Admission::CountRefused(Refusal refusal, int samples) {
  account_.received += samples;
  account_.refused[static_cast<int>(refusal)] += samples;
}

absl::Status Admission::Admit(const Request& request, SteadyTime now, Expectation* expected, int samples) {
  const std::string wanted = samples == 1 ? "" : absl::StrCat(" and this one asks for ", samples, " samples");
  const auto full = [&](Refusal refusal, const std::string& what, int64_t limit) {
    return Refuse(refusal, absl::ResourceExhaustedError(absl::StrCat(what, "; the limit is ", limit)), RetryAfter(),
                  samples);
  };
  const AdmissionOptions& o = options_;
  const auto prompt = static_cast<int64_t>(request.prompt.size()) * samples;
  // The last quarter of the queue is not for those who can wait.
  const int64_t places =
      request.urgency == Urgency::kBatch ? o.max_waiting_requests - o.max_waiting_requests / 4 : o.max_waiting_requests;
  if (waiting_ + samples > places) {
    return full(Refusal::kQueueFull, absl::StrCat("the queue is full: ", waiting_, " requests wait", wanted), places);
  }
  // A queue that is empty takes any prompt: a limit below the longest one shall not lock it out for ever.
  if (o.max_waiting_tokens > 0 && waiting_ > 0 && waiting_prompt_tokens_ + prompt > o.max_waiting_tokens) {
    return full(Refusal::kQueueTokens,
                absl::StrCat("the queue holds ", waiting_prompt_tokens_, " prompt tokens and this one has ", prompt),
                o.max_waiting_tokens);
  }
  const auto found = tenants_.find(request.tenant);
  const Queued mine = found != tenants_.end() ? found->second : Queued();
  const std::string who =
      request.tenant.empty() ? "requests without a tenant" : absl::StrCat("tenant ", request.tenant);
  if (o.tenant_max_waiting_requests > 0 && mine.requests + samples > o.tenant_max_waiting_requests) {
    return full(Refusal::kTenantRequests, absl::StrCat(who, ": ", mine.requests, " wait", wanted),
                o.tenant_max_waiting_requests);
  }
  if (o.tenant_max_waiting_tokens > 0 && mine.requests > 0 && mine.tokens + prompt > o.tenant_max_waiting_tokens) {
    return full(Refusal::kTenantTokens,
                absl::StrCat(who, ": ", mine.tokens, " prompt tokens wait and this one has ", prompt),
                o.tenant_max_waiting_tokens);
  }
  Fade(now);
  if (o.deadline_slack > 0.0 && load_.learned && request.deadline != SteadyTime::max()) {
    const double left_ms = Milliseconds(now, request.deadline);
    const double needed_ms = idle() ? LeastMs(request, now, samples) : PredictMs(request, samples);
    if (needed_ms > left_ms * o.deadline_slack) {
      if (idle() && !doubted_since_.has_value()) doubted_since_ = now;
      return Refuse(Refusal::kDeadlineInfeasible, CannotMeet(request, needed_ms, left_ms), RetryAfter(), samples);
    }
  }
  if (expected != nullptr) *expected = Predict(request, samples);
  account_.received += samples;
  account_.live += samples;
  Move(request, samples);
  return absl::OkStatus();
}

void Admission::Scheduled(const Request& request) { Move(request, -1); }
void Admission::Requeued(const Request& request) { Move(request, 1); }

void Admission::Ended(const Request& request, FinishReason reason, bool waiting) {
  if (waiting) Move(request, -1);
  --account_.live;
  switch (reason) {
    case FinishReason::kLength:
    case FinishReason::kTime:
    case FinishReason::kEos:
    case FinishReason::kStopToken:
    case FinishReason::kSink:
      ++account_.finished;
      break;
    case FinishReason::kCancelled:
    case FinishReason::kDeadline:
      ++account_.cancelled;
      break;
    case FinishReason::kShutdown:
    case FinishReason::kError:
      ++account_.failed;
      break;
  }
}

void Admission::Move(const Request& request, int count) {
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  const int u = static_cast<int>(request.urgency);
  waiting_ += count;
  waiting_prompt_tokens_ += count * prompt;
  waiting_of_[u] += count;
  waiting_prompt_[u] += count * prompt;
  waiting_output_[u] += count * request.max_new_tokens;
  Queued& mine = tenants_[request.tenant];
  mine.requests += count;
  mine.tokens += count * prompt;
  CHECK(waiting_ >= 0 && mine.requests >= 0) << waiting_ << " wait";
  if (mine.requests == 0) tenants_.erase(request.tenant);
}

void Admission::SetLoad(const Load& load) {
  load_ = load;
  if (load.running > 0) doubted_since_.reset();
}

double Admission::StepMs(int32_t rows, Tier tier) const {
  const double base = tier == Tier::kDense   ? load_.costs.dense_ms
                      : tier == Tier::kExact ? load_.costs.exact_ms
                                             : load_.costs.predicted_ms;
  return base + load_.costs.row_ms * rows;
}

// The queue ahead shares the slots; then the prompt, in steps of its own; then a step for each token.
Expectation Admission::Predict(const Request& request, int samples) const {
  const int32_t slots = scheduler_.max_batch;
  const int32_t rows =
      std::min<int32_t>(slots, load_.running + static_cast<int32_t>(std::min<int64_t>(waiting_, slots)) + samples);
  const Tier tier = std::min(request.sparsity.tier, load_.running > 0 ? load_.costliest_tier : Tier::kFast);
  const double step_ms = StepMs(rows, tier);
  const double prompt_step_ms =
      StepMs(std::max(0, rows - samples), std::min(tier, Tier::kExact));  // it has no rows of its own yet
  double prompts = 0.0, outputs = 0.0, requests = 0.0;
  for (int u = 0; u <= static_cast<int>(request.urgency); ++u) {
    requests += static_cast<double>(waiting_of_[u]);
    prompts += static_cast<double>(waiting_prompt_[u]);
    outputs += static_cast<double>(waiting_output_[u]);
  }
  double ms = 0.0;
  if (load_.running + requests >= slots) {
    ms += static_cast<double>(load_.first_free_steps) * step_ms;
    ms += outputs / slots * step_ms + prompts * load_.costs.prefill_token_ms;
  }
  const auto prompt = static_cast<double>(request.prompt.size());
  const int32_t chunk = request.score ? std::min(scheduler_.prefill_chunk_tokens, scheduler_.score_rows)
                                      : scheduler_.prefill_chunk_tokens;
  ms += prompt * load_.costs.prefill_token_ms + std::ceil(prompt / chunk) * prompt_step_ms;
  return {ms * margin_, step_ms * margin_};
}

double Admission::PredictMs(const Request& request, int samples) const {
  const Expectation expected = Predict(request, samples);
  return expected.first_token_ms + std::max(0, request.max_new_tokens - 1) * expected.token_ms;
}

// Without the margin: nothing but steps is in its way.
double Admission::LeastMs(const Request& request, SteadyTime now, int samples) const {
  constexpr double kDoubtS = 30.0;  // halves what is predicted
  if (IsPredicted(request.sparsity.tier) && !load_.learned_predicted)
    return 0.0;  // how fast such a tier is nobody knows
  const double doubt =
      doubted_since_.has_value() ? std::exp2(-std::max(0.0, Seconds(*doubted_since_, now)) / kDoubtS) : 1.0;
  return PredictMs(request, samples) / margin_ * load_.best_share * doubt;
}

// What was learned while the system was disturbed does not last.
void Admission::Fade(SteadyTime now) {
  constexpr double kFadeS = 60.0;  // halves what is above 1
  margin_ = 1.0 + (margin_ - 1.0) * std::exp2(-std::max(0.0, Seconds(faded_, now)) / kFadeS);
  faded_ = std::max(faded_, now);
}

// A quantile followed in small steps: up nine times as fast as down.
void Admission::NoteOutcome(const Expectation& expected, double ms, int32_t tokens) {
  constexpr double kStep = 0.02, kKept = 0.9, kMost = 8.0;
  const double expected_ms = expected.first_token_ms + std::max(0, tokens - 1) * expected.token_ms;
  if (!load_.learned || expected_ms <= 0.0) return;
  margin_ *= ms > expected_ms ? 1.0 + kStep * kKept : 1.0 - kStep * (1.0 - kKept);
  margin_ = std::clamp(margin_, 1.0, kMost);
}

// When a place in the queue is likely to be free: one request of the usual size from now.
std::chrono::milliseconds Admission::RetryAfter() const {
  if (!load_.learned) return std::chrono::milliseconds(1000);
  const double step_ms = StepMs(std::min(scheduler_.max_batch, load_.running + 1), load_.costliest_tier);
  const double ms = static_cast<double>(std::max<int64_t>(1, load_.first_free_steps)) * step_ms;
  return std::chrono::milliseconds(static_cast<int64_t>(std::clamp(ms, kLeastRetryMs, kMostRetryMs)));
}

}  // namespace dejavu
