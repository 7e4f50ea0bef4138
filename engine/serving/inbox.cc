#include "engine/serving/inbox.h"

#include <utility>

namespace dejavu {

void Inbox::Wake() {
  has_mail_ = true;
  work_.NotifyOne();
}

absl::Status Inbox::RefuseInvalid(absl::Status status, int samples) {
  MutexLock lock(mutex_);
  return admission_.Refuse(Refusal::kInvalid, std::move(status), std::chrono::milliseconds(0), samples);
}

void Inbox::CountRefused(Refusal reason, int samples) {
  MutexLock lock(mutex_);
  admission_.CountRefused(reason, samples);
}

absl::StatusOr<uint64_t> Inbox::Submit(std::vector<std::unique_ptr<Sequence>> sequences) {
  constexpr std::chrono::milliseconds kElsewhere(1000);  // another server, or this one after its restart
  const auto samples = static_cast<int>(sequences.size());
  MutexLock lock(mutex_);
  if (failed_) {
    return admission_.Refuse(Refusal::kFailed,
                             absl::UnavailableError("the engine has failed; the server must be restarted"), kElsewhere,
                             samples);
  }
  if (draining_ || stopping_) {
    return admission_.Refuse(Refusal::kDraining,
                             absl::UnavailableError("the engine is draining; it takes no new requests"), kElsewhere,
                             samples);
  }
  Expectation expected;
  const Sequence& first = *sequences.front();
  if (absl::Status admitted = admission_.Admit(first.request, first.arrival, &expected, samples); !admitted.ok()) {
    return admitted;
  }
  const uint64_t first_id = next_id_;
  for (std::unique_ptr<Sequence>& sequence : sequences) {
    sequence->expected = expected;
    sequence->id = next_id_++;
    submitted_.push_back(std::move(sequence));
  }
  unfinished_ += samples;
  Wake();
  return first_id;
}

void Inbox::Cancel(uint64_t id) {
  MutexLock lock(mutex_);
  cancelled_.push_back(id);
  Wake();
}

void Inbox::Drain(bool refuse_waiting) {
  MutexLock lock(mutex_);
  draining_ = true;
  refuse_waiting_ = refuse_waiting;
  Wake();
}

bool Inbox::WaitIdle(SteadyTime deadline) {
  MutexLock lock(mutex_);
  while (unfinished_ > 0) {
    if (!idle_.WaitUntil(mutex_, deadline)) return unfinished_ == 0;
  }
  return true;
}

absl::Status Inbox::Swap(const std::shared_ptr<PredictorReload>& reload) {
  constexpr std::chrono::milliseconds kLook(200);  // a failed engine tells nobody
  MutexLock lock(mutex_);
  while (!reload->result.has_value()) {
    if (failed_ || stopping_) return absl::UnavailableError("the engine has failed; the server must be restarted");
    if (reload_ == nullptr) {
      reload_ = reload;
      Wake();
    }
    reloaded_.WaitUntil(mutex_, std::chrono::steady_clock::now() + kLook);
  }
  return *reload->result;
}

void Inbox::FillStats(EngineStats* stats) const {
  MutexLock lock(mutex_);
  stats->waiting = static_cast<int32_t>(admission_.waiting());
  stats->waiting_tokens = admission_.waiting_prompt_tokens();
  for (int u = 0; u < kUrgencies; ++u) {
    stats->waiting_of[u] = static_cast<int32_t>(admission_.waiting(static_cast<Urgency>(u)));
  }
  stats->account = admission_.account();
  stats->costs = costs_;
}

void Inbox::Stop() {
  MutexLock lock(mutex_);
  stopping_ = true;
  has_mail_ = true;
  work_.NotifyAll();
}

void Inbox::WaitUntilStopped() {
  MutexLock lock(mutex_);
  while (!stopping_) work_.Wait(mutex_);
}

void Inbox::Take(bool busy, bool may_reload, std::optional<SteadyTime::duration> patience, Mail* mail) {
  MutexLock lock(mutex_);
  const auto nothing = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !busy && !stopping_ && !failed_ && submitted_.empty() && cancelled_.empty() && reload_ == nullptr;
  };
  mail->nothing = false;
  while (nothing() && !patience.has_value()) work_.Wait(mutex_);
  if (nothing() && !work_.WaitUntil(mutex_, std::chrono::steady_clock::now() + *patience)) mail->nothing = nothing();
  if (may_reload) mail->reload = reload_;
  has_mail_.store(reload_ != mail->reload, std::memory_order_release);
  mail->arrived.swap(submitted_);
  mail->cancelled.swap(cancelled_);
  mail->stopping = stopping_;
  mail->refuse_waiting = refuse_waiting_;
}

void Inbox::Reloaded(PredictorReload& reload, absl::Status status) {
  MutexLock lock(mutex_);
  reload.result = std::move(status);
  reload_.reset();
  reloaded_.NotifyAll();
}

void Inbox::NotePlan(const Scheduler& scheduler) {
  MutexLock lock(mutex_);
  for (const Sequence* s : scheduler.admitted()) admission_.Scheduled(s->request);
  for (const Sequence* s : scheduler.preempted()) admission_.Requeued(s->request);
  Inform(scheduler);
}

void Inbox::NoteCosts(const Scheduler& scheduler) {
  MutexLock lock(mutex_);
  Inform(scheduler);
}

void Inbox::NoteEnd(const Sequence& s, bool waiting, const Scheduler& scheduler) {
  const Finish& finish = s.finish;
  MutexLock lock(mutex_);
  admission_.Ended(s.request, finish.reason, waiting);
  // A request that left by itself says nothing about how long it would have taken; a deadline says that it took too
  // long.
  if (finish.reason != FinishReason::kCancelled && finish.reason != FinishReason::kError &&
      finish.reason != FinishReason::kShutdown) {
    admission_.NoteOutcome(s.expected, Milliseconds(s.arrival, finish.finished), finish.generated_tokens);
  }
  Inform(scheduler);
}

void Inbox::NoteHeard() {
  MutexLock lock(mutex_);
  if (--unfinished_ == 0) idle_.NotifyAll();
}

void Inbox::Inform(const Scheduler& scheduler) {
  scheduler.Inform(admission_);
  costs_ = scheduler.costs().parameters();
}

}  // namespace dejavu
