// Inbox: what callers ask of the engine, kept for its thread, and Admission, which decides in the callers' threads who
// comes in. One mutex guards both. The engine thread looks in between two steps; a flag tells it when nothing has come,
// so that a decode step takes no lock.
#ifndef ENGINE_SERVING_INBOX_H_
#define ENGINE_SERVING_INBOX_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/options.h"
#include "engine/refusal.h"
#include "engine/request.h"
#include "engine/scheduling/admission.h"
#include "engine/scheduling/scheduler.h"
#include "engine/scheduling/sequence.h"
#include "engine/serving/predictor_reload.h"
#include "engine/stats.h"
#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"

namespace dejavu {

class Inbox {
 public:
  Inbox(const AdmissionOptions& options, const SchedulerOptions& scheduler) : admission_(options, scheduler) {}

  // Any thread, from here on.

  // Counts requests that can never run; gives `status` back as their refusal.
  absl::Status RefuseInvalid(absl::Status status, int samples);
  void CountRefused(Refusal reason, int samples);
  // All of them, which share one prompt, or none. The id of the first; the others follow it.
  absl::StatusOr<uint64_t> Submit(std::vector<std::unique_ptr<Sequence>> sequences);
  void Cancel(uint64_t id);
  void Drain(bool refuse_waiting);
  bool WaitIdle(SteadyTime deadline);
  // Returns what the engine thread made of it; UNAVAILABLE once the engine has failed or stops.
  absl::Status Swap(const std::shared_ptr<PredictorReload>& reload);
  void FillStats(EngineStats* stats) const;

  // The engine is to end.
  void Stop();
  void WaitUntilStopped();
  // The engine has failed: nothing comes in any more.
  void SetFailed() { failed_ = true; }
  bool failed() const { return failed_; }

  // Engine thread, from here on.

  struct Mail {
    std::vector<std::unique_ptr<Sequence>> arrived;
    std::vector<uint64_t> cancelled;
    std::shared_ptr<PredictorReload> reload;  // null: none
    bool refuse_waiting = false;
    bool stopping = false;
    bool nothing = false;  // nothing came in `patience`
  };

  // Whether anything has changed since the last Take.
  bool has_mail() const { return has_mail_.load(std::memory_order_acquire); }
  // Fills `mail`, which is empty. Unless `busy`, waits for something, for as long as `patience` if there is a limit.
  // A reload stays where it is unless `may_reload`.
  void Take(bool busy, bool may_reload, std::optional<SteadyTime::duration> patience, Mail* mail);
  // What became of a reload that Take gave.
  void Reloaded(PredictorReload& reload, absl::Status status);

  // What the scheduler's last plan let run, or sent back.
  void NotePlan(const Scheduler& scheduler);
  // What the costs are now, for predictions.
  void NoteCosts(const Scheduler& scheduler);
  // `s` has ended, its Finish is filled in, and `scheduler` has it no longer.
  void NoteEnd(const Sequence& s, bool waiting, const Scheduler& scheduler);
  // Its sink has heard so.
  void NoteHeard();

 private:
  void Inform(const Scheduler& scheduler) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Wake() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;
  CondVar work_;      // something for the engine thread
  CondVar idle_;      // unfinished_ became 0
  CondVar reloaded_;  // reload_ was taken, or has its result
  std::vector<std::unique_ptr<Sequence>> submitted_ ABSL_GUARDED_BY(mutex_);
  std::vector<uint64_t> cancelled_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<PredictorReload> reload_ ABSL_GUARDED_BY(mutex_);
  Admission admission_ ABSL_GUARDED_BY(mutex_);
  CostParameters costs_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_id_ ABSL_GUARDED_BY(mutex_) = 1;
  int32_t unfinished_ ABSL_GUARDED_BY(mutex_) = 0;  // accepted, OnFinish not called yet
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool refuse_waiting_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::atomic<bool> failed_ = false;
  std::atomic<bool> has_mail_ = false;
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_INBOX_H_
