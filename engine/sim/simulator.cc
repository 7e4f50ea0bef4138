#include "engine/sim/simulator.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "engine/model/batch.h"
#include "engine/scheduling/block_pool.h"
#include "kernels/base/clock.h"
#include "kernels/draw.h"

namespace dejavu {
namespace {

SteadyTime At(double seconds) { return SteadyTime() + Lasting(seconds); }

class Simulation {
 public:
  explicit Simulation(const SimOptions& options)
      : options_(options),
        truth_(options.costs),
        pool_(options.kv_blocks, options.block_tokens),
        scheduler_(pool_, options.scheduler),
        admission_(options.admission, options.scheduler),
        batch_(options.scheduler.max_step_tokens, options.scheduler.max_batch + options.scheduler.score_rows,
               options.scheduler.max_batch, pool_.BlocksFor(options.context)) {
    if (options.speculation.mode == SpeculationMode::kOff) return;
    // An engine's first steps show what drafts cost.
    for (const StepShape& shape :
         {StepShape{Tier::kExact, 1}, StepShape{Tier::kExact, 1, 0, 0, options.speculation.most_tokens},
          StepShape{options.speculation.draft_tier, 1, 0, 0, 0, true}}) {
      for (int i = 0; i < 3; ++i) scheduler_.Learn(shape, truth_.Predict(shape));
    }
  }

  SimResult Run(const std::function<std::optional<SimRequest>()>& next, const std::function<void(double)>& progress);

 private:
  struct Live {
    SimRequest request;
    double last_token_s = -1.0;
    double first_token_s = -1.0;
  };

  void Arrive(const SimRequest& request);
  void Step(bool arriving);
  void Tokens(Sequence& s, bool arriving);
  void End(const Sequence& sequence, FinishReason reason);
  void EndOverdue();

  const SimOptions options_;
  const CostModel truth_;
  BlockPool pool_;
  Scheduler scheduler_;
  Admission admission_;
  Batch batch_;
  double now_s_ = 0.0;
  uint64_t next_id_ = 1;
  absl::flat_hash_map<uint64_t, Live> live_;
  std::vector<std::pair<const Sequence*, FinishReason>> ending_;
  SimResult result_;
};

void Simulation::Arrive(const SimRequest& r) {
  Request request;
  request.prompt.resize(std::max(1, r.prompt_tokens));
  // Prompts of one prefix id begin alike; no two go on alike.
  const auto unique = static_cast<int32_t>(next_id_ % (1u << 30));
  for (int32_t i = 0; i < static_cast<int32_t>(request.prompt.size()); ++i) {
    request.prompt[i] = i < r.shared_prefix_tokens ? -1 - r.prefix_id : unique;
  }
  request.max_new_tokens = std::max({1, r.max_new_tokens, r.output_tokens});
  request.urgency = r.urgency;
  request.tenant = r.tenant;
  request.sparsity.tier = r.tier;
  request.speculation = options_.speculation;
  if (r.deadline_s > 0.0) request.deadline = At(r.arrival_s + r.deadline_s);
  Expectation expected;
  if (!admission_.Admit(request, At(r.arrival_s), &expected).ok()) return;
  auto sequence = std::make_unique<Sequence>(std::move(request), nullptr);
  sequence->expected = expected;
  sequence->id = next_id_++;
  sequence->arrival = At(r.arrival_s);
  if (options_.prefix_cache && r.shared_prefix_tokens > 0) {
    sequence->keys = BlockKeys(r.tenant, "", sequence->request.prompt, options_.block_tokens);
  }
  live_[sequence->id].request = r;
  scheduler_.Enqueue(std::move(sequence));
  result_.most_waiting = std::max(result_.most_waiting, static_cast<int32_t>(scheduler_.waiting().size()));
}

void Simulation::EndOverdue() {
  scheduler_.ForEachOverdue(At(now_s_),
                            [&](const Sequence& s, FinishReason reason) { ending_.emplace_back(&s, reason); });
  for (const auto& [s, reason] : ending_) End(*s, reason);
  ending_.clear();
}

void Simulation::Step(bool arriving) {
  EndOverdue();
  scheduler_.Plan(At(now_s_), batch_);
  for (Sequence* s : scheduler_.admitted()) {
    admission_.Scheduled(s->request);
    if (s->preemptions > 0) continue;
    const double waited_s = now_s_ - live_[s->id].request.arrival_s;
    result_.longest_queue_age_s = std::max(result_.longest_queue_age_s, waited_s);
    for (SimClass* of : {&result_.all, &result_.of_urgency[static_cast<int>(s->request.urgency)]}) {
      of->queue_ms.Add(1000.0 * waited_s);
    }
    result_.cached_prompt_tokens += s->computed;
  }
  for (Sequence* s : scheduler_.preempted()) admission_.Requeued(s->request);
  result_.preemptions += static_cast<int64_t>(scheduler_.preempted().size());
  result_.most_kv_blocks = std::max(result_.most_kv_blocks, pool_.total() - pool_.free());
  if (batch_.rows() == 0) return;
  const double ms = std::max(1e-3, truth_.Predict(scheduler_.shape()));
  now_s_ += ms / 1000.0;
  ++result_.steps;
  for (const auto& s : scheduler_.running()) {
    if (s->step_rows == 0) continue;
    const int32_t prompt_rows = std::min(s->step_rows, std::max(0, s->prompt_tokens() - s->computed));
    if (arriving) result_.tenants[s->request.tenant].prompt_tokens += prompt_rows;
    if (s->step_logits == 0) continue;
    if (s->step_use == Sequence::Use::kDraft) {
      s->round.drafts.push_back(0);
    } else {
      Tokens(*s, arriving);
    }
  }
  scheduler_.NoteStep(ms);
  for (const auto& [s, reason] : ending_) End(*s, reason);
  ending_.clear();
  scheduler_.Inform(admission_);
}

// One token, or those that a check gives, which are one delivery: a draft, which is token 0, is right as often as the
// options say, by a number that no clock moves.
void Simulation::Tokens(Sequence& s, bool arriving) {
  Live& live = live_[s.id];
  bool more = true;
  while (more && s.generated_tokens() < live.request.output_tokens) {
    const uint64_t drawn = MixBits(s.id * kGoldenRatio + static_cast<uint64_t>(s.generated_tokens()));
    const bool right = static_cast<double>(drawn >> 11) * 0x1p-53 < options_.draft_acceptance;
    more = s.Take(right ? 0 : 1);
    if (arriving) ++result_.tenants[s.request.tenant].output_tokens;
  }
  SimClass* const classes[] = {&result_.all, &result_.of_urgency[static_cast<int>(s.request.urgency)]};
  for (SimClass* of : classes) {
    if (live.last_token_s < 0.0) {
      of->ttft_ms.Add(1000.0 * (now_s_ - live.request.arrival_s));
    } else {
      of->inter_token_ms.Add(1000.0 * (now_s_ - live.last_token_s));
    }
  }
  if (live.first_token_s < 0.0) live.first_token_s = now_s_;
  live.last_token_s = now_s_;
  if (s.generated_tokens() >= live.request.output_tokens) ending_.emplace_back(&s, FinishReason::kLength);
}

void Simulation::End(const Sequence& sequence, FinishReason reason) {
  const bool waiting = sequence.slot < 0;
  const std::unique_ptr<Sequence> s = scheduler_.Remove(sequence);
  admission_.Ended(s->request, reason, waiting);
  const Live& live = live_[s->id];
  admission_.NoteOutcome(s->expected, 1000.0 * (now_s_ - live.request.arrival_s), s->generated_tokens());
  if (reason == FinishReason::kLength) {
    const double ttft_ms = 1000.0 * (live.first_token_s - live.request.arrival_s);
    const int32_t gaps = s->generated_tokens() - 1;
    const double between_ms = gaps > 0 ? 1000.0 * (live.last_token_s - live.first_token_s) / gaps : 0.0;
    const bool good = (options_.ttft_target_ms <= 0.0 || ttft_ms <= options_.ttft_target_ms) &&
                      (options_.inter_token_target_ms <= 0.0 || between_ms <= options_.inter_token_target_ms);
    for (SimClass* of : {&result_.all, &result_.of_urgency[static_cast<int>(s->request.urgency)]}) {
      ++of->finished;
      of->good += good;
    }
  }
  live_.erase(s->id);
}

SimResult Simulation::Run(const std::function<std::optional<SimRequest>()>& next,
                          const std::function<void(double)>& progress) {
  std::optional<SimRequest> coming = next();
  double told_s = 0.0;
  while (true) {
    while (coming.has_value() && coming->arrival_s <= now_s_) {
      Arrive(*coming);
      coming = next();
    }
    if (scheduler_.running().empty() && scheduler_.waiting().empty()) {
      if (!coming.has_value()) break;
      now_s_ = std::max(now_s_, coming->arrival_s);
      continue;
    }
    Step(coming.has_value());
    if (progress != nullptr && now_s_ - told_s > 60.0) progress(told_s = now_s_);
  }
  result_.seconds = now_s_;
  result_.account = admission_.account();
  result_.speculation = scheduler_.speculation();
  return std::move(result_);
}

}  // namespace

SimResult Simulate(const SimOptions& options, const std::function<std::optional<SimRequest>()>& next,
                   const std::function<void(double)>& progress) {
  return Simulation(options).Run(next, progress);
}

}  // namespace dejavu
