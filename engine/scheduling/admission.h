// Admission: who may come in. Bounded queues, for everybody and for each tenant, and deadlines that can be met; and the
// books of what became of every request. A state machine without a clock: the caller keeps it under a lock.
//
// Who is refused teaches nothing, so that a prediction that is wrong must not last. A server where nothing runs or
// waits takes whoever could be served in time at the best speed that it has seen lately, and what it has refused makes
// it doubt its predictions more with time, until something runs again.
#ifndef ENGINE_SCHEDULING_ADMISSION_H_
#define ENGINE_SCHEDULING_ADMISSION_H_

#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "engine/options.h"
#include "engine/refusal.h"
#include "engine/request.h"
#include "engine/scheduling/cost_model.h"
#include "engine/stats.h"

namespace dejavu {

// From its arrival.
struct Expectation {
  double first_token_ms = 0.0;
  double token_ms = 0.0;  // each further one
};

class Admission {
 public:
  explicit Admission(const AdmissionOptions& options, const SchedulerOptions& scheduler = {})
      : options_(options), scheduler_(scheduler) {}

  // Each request goes through exactly one of these first. What it is expected to take goes to `expected`, if not null.
  // Several samples of one prompt come in together or not at all.
  absl::Status Admit(const Request& request, SteadyTime now, Expectation* expected = nullptr, int samples = 1);
  absl::Status Refuse(Refusal refusal, absl::Status status, std::chrono::milliseconds retry_after, int samples = 1);
  void CountRefused(Refusal refusal, int samples);

  // It left the queue to run; it came back; it ended, from the queue or not.
  void Scheduled(const Request& request);
  void Requeued(const Request& request);
  void Ended(const Request& request, FinishReason reason, bool waiting);
  // How it went: after `ms` it had `tokens`. Predictions learn from it to be kept nine times in ten.
  void NoteOutcome(const Expectation& expected, double ms, int32_t tokens);

  // What predictions are made of.
  struct Load {
    CostParameters costs;
    bool learned = false, learned_predicted = false;  // any tier, and one that is predicted
    double best_share = 1.0;                          // of what is predicted: the least that a step took lately
    Tier costliest_tier = Tier::kFast;
    int32_t running = 0;
    int64_t first_free_steps = 0;  // that the first of them still needs
  };
  void SetLoad(const Load& load);

  Expectation Predict(const Request& request, int samples = 1) const;
  // From now to the last token.
  double PredictMs(const Request& request, int samples = 1) const;

  const Account& account() const { return account_; }
  int64_t waiting() const { return waiting_; }
  int64_t waiting(Urgency urgency) const { return waiting_of_[static_cast<size_t>(urgency)]; }
  int64_t waiting_prompt_tokens() const { return waiting_prompt_tokens_; }

 private:
  struct Queued {
    int64_t requests = 0, tokens = 0;
  };
  std::chrono::milliseconds RetryAfter() const;
  bool idle() const { return waiting_ == 0 && load_.running == 0; }
  void Fade(SteadyTime now);
  double LeastMs(const Request& request, SteadyTime now, int samples) const;
  double StepMs(int32_t rows, Tier tier) const;
  void Move(const Request& request, int count);

  const AdmissionOptions options_;
  const SchedulerOptions scheduler_;
  Account account_;
  int64_t waiting_ = 0, waiting_prompt_tokens_ = 0;
  std::array<int64_t, kUrgencies> waiting_of_ = {}, waiting_prompt_ = {}, waiting_output_ = {};
  absl::flat_hash_map<std::string, Queued> tenants_;  // those that have something in the queue

  Load load_;
  double margin_ = 1.0;                      // what predictions are multiplied by
  SteadyTime faded_;                         // when it last was brought nearer to 1
  std::optional<SteadyTime> doubted_since_;  // the first refusal of an idle server since something ran
};

}  // namespace dejavu

#endif  // ENGINE_SCHEDULING_ADMISSION_H_
