#include "engine/scheduling/admission.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace dejavu {
namespace {

constexpr std::chrono::milliseconds kLeastRetry(100), kMostRetry(30'000);

absl::Status CannotMeet(const Request& request, double needed_ms, double left_ms) {
  return absl::DeadlineExceededError(absl::StrCat(
      "the request would take about ", std::ceil(needed_ms), " ms and its deadline leaves ",
      std::max(0.0, std::floor(left_ms)), " ms; ask for fewer than ", request.max_new_tokens, " tokens or more time"));
}

}  // namespace

absl::Status Admission::Refuse(Refusal refusal, absl::Status status, std::chrono::milliseconds retry_after,
                               int samples) {
  account_.received += samples;
  account_.refused[static_cast<int>(refusal)] += samples;
  return WithRefusal(std::move(status), {refusal, retry_after});
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
  if (o.deadline_slack > 0.0 && learned_ && request.deadline != SteadyTime::max()) {
    const double left_ms = Milliseconds(now, request.deadline), needed_ms = PredictMs(request, samples);
    if (needed_ms > left_ms * o.deadline_slack) {
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

void Admission::SetLoad(const CostParameters& costs, bool learned, Tier costliest, int32_t running,
                        int64_t first_free_steps) {
  costs_ = costs;
  learned_ = learned;
  costliest_tier_ = costliest;
  running_ = running;
  first_free_steps_ = first_free_steps;
}

double Admission::StepMs(int32_t rows, Tier tier) const {
  const double base = tier == Tier::kDense   ? costs_.dense_ms
                      : tier == Tier::kExact ? costs_.exact_ms
                                             : costs_.predicted_ms;
  return base + costs_.row_ms * rows;
}

// The queue ahead shares the slots; then the prompt, in steps of its own; then a step for each token.
Expectation Admission::Predict(const Request& request, int samples) const {
  const int32_t slots = scheduler_.max_batch;
  const int32_t rows =
      std::min<int32_t>(slots, running_ + static_cast<int32_t>(std::min<int64_t>(waiting_, slots)) + samples);
  const double step_ms = StepMs(rows, std::min(request.sparsity.tier, running_ > 0 ? costliest_tier_ : Tier::kFast));
  double prompts = 0.0, outputs = 0.0, requests = 0.0;
  for (int u = 0; u <= static_cast<int>(request.urgency); ++u) {
    requests += static_cast<double>(waiting_of_[u]);
    prompts += static_cast<double>(waiting_prompt_[u]);
    outputs += static_cast<double>(waiting_output_[u]);
  }
  double ms = 0.0;
  if (running_ + requests >= slots) {
    ms += static_cast<double>(first_free_steps_) * step_ms;
    ms += outputs / slots * step_ms + prompts * costs_.prefill_token_ms;
  }
  const auto prompt = static_cast<double>(request.prompt.size());
  ms += prompt * costs_.prefill_token_ms + std::ceil(prompt / scheduler_.prefill_chunk_tokens) * step_ms;
  return {ms * margin_, step_ms * margin_};
}

double Admission::PredictMs(const Request& request, int samples) const {
  const Expectation expected = Predict(request, samples);
  return expected.first_token_ms + std::max(0, request.max_new_tokens - 1) * expected.token_ms;
}

// A quantile followed in small steps: up nine times as fast as down.
void Admission::NoteOutcome(const Expectation& expected, double ms, int32_t tokens) {
  constexpr double kStep = 0.02, kKept = 0.9, kMost = 8.0;
  const double expected_ms = expected.first_token_ms + std::max(0, tokens - 1) * expected.token_ms;
  if (!learned_ || expected_ms <= 0.0) return;
  margin_ *= ms > expected_ms ? 1.0 + kStep * kKept : 1.0 - kStep * (1.0 - kKept);
  margin_ = std::clamp(margin_, 1.0, kMost);
}

// When a place in the queue is likely to be free: one request of the usual size from now.
std::chrono::milliseconds Admission::RetryAfter() const {
  if (!learned_) return std::chrono::milliseconds(1000);
  const double step_ms = StepMs(std::min(scheduler_.max_batch, running_ + 1), costliest_tier_);
  const auto ms = static_cast<int64_t>(static_cast<double>(std::max<int64_t>(1, first_free_steps_)) * step_ms);
  return std::clamp(std::chrono::milliseconds(ms), kLeastRetry, kMostRetry);
}

}  // namespace dejavu
