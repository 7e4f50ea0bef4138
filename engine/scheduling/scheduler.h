// Scheduler: which sequences run and what each contributes to the next step. A state machine: events go in with the
// time at which they happen, a batch comes out. No threads, no device, no clock of its own. Engine thread only.
//
// Who comes next, when a slot and the KV blocks are free:
//   1. the urgency: INTERACTIVE before NORMAL before BATCH;
//   2. the tenant that has been served least for its weight (virtual token counters: Sheng et al., Fairness in Serving
//      Large Language Models, OSDI 2024), each urgency by itself;
//   3. within a tenant the priority, then the earliest deadline, then tiers that read no more than what runs reads
//      already, then the order of arrival.
// Nothing starves: a sequence that has waited longer than `ageing_s` is old, and one admission in kAgedTurn goes to the
// oldest of those. BATCH leaves slots for as many others as there were at once lately. A sequence whose prefix another
// one is computing waits for it, and shares it.
//
// By default a sequence is admitted when all the blocks that it can ever need are free, so nothing that runs is ever
// evicted. With `overcommit` it takes blocks as it grows, and where none is left the youngest of the least urgent goes
// back to the queue and is computed again. Whose answer would change by that takes all its blocks at once even so, and
// stays (Grows).
#ifndef ENGINE_SCHEDULING_SCHEDULER_H_
#define ENGINE_SCHEDULING_SCHEDULER_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "engine/model/batch.h"
#include "engine/options.h"
#include "engine/scheduling/admission.h"
#include "engine/scheduling/block_pool.h"
#include "engine/scheduling/cost_model.h"
#include "engine/scheduling/rounds.h"
#include "engine/scheduling/sequence.h"

namespace dejavu {

class Scheduler {
 public:
  static constexpr int kAgedTurn = 8;

  Scheduler(BlockPool& pool, const SchedulerOptions& options, CostModel costs = CostModel());

  // `arrival` and `keys` are set; the sequence fits the pool.
  void Enqueue(std::unique_ptr<Sequence> sequence);

  // Admits what fits and fills `batch` and each running sequence's step_* fields: one row for everything that decodes,
  // and one more for each draft that is checked, then prompts in chunks, the most urgent first, as far as the target
  // allows. While a round drafts (engine/scheduling/rounds.h): one row for each sequence that does, and nothing else.
  void Plan(SteadyTime now, Batch& batch);
  // Fills `ahead`, and each running sequence's share of it, with the step that follows `batch`, the last plan, while
  // that is being computed. Tokens that it draws are named as what it draws. After text the same rows come, each a
  // token further; after a step that drafts the next one that does, or that with the checks. False where somebody's
  // last token is on its way or Plan might have another idea. When `batch` has been noted and handed out, TakeAhead
  // puts the step in its place; Plan may be called when nothing is under way.
  bool PlanAhead(const Batch& batch, Batch& ahead);
  void TakeAhead();
  // Since when Plan has last begun; valid until something is removed.
  const std::vector<Sequence*>& admitted() const { return admitted_; }
  const std::vector<Sequence*>& preempted() const { return preempted_; }

  // Of each row of the planned step, which has been computed, how many of its keys and values were beyond the range of
  // the cache's type. Returns their sum.
  int64_t NoteSaturated(const std::vector<int32_t>& of_rows);
  // The planned step has been computed; sequences have their next tokens, or their next drafts.
  void NoteStep(double ms);
  const SpeculationTotals& speculation() const { return rounds_.totals(); }

  // Takes a sequence out, wherever it is, and frees its slot and blocks.
  std::unique_ptr<Sequence> Remove(const Sequence& sequence);

  // In order of admission, and of arrival. Remove and Plan change them.
  const std::vector<std::unique_ptr<Sequence>>& running() const { return running_; }
  const std::vector<std::unique_ptr<Sequence>>& waiting() const { return waiting_; }

  // Calls end(Sequence&, FinishReason) for each sequence that has to end by `now`, running ones first. `end` must not
  // remove anything yet.
  template <typename End>
  void ForEachOverdue(SteadyTime now, const End& end) const {
    for (const auto* sequences : {&running_, &waiting_}) {
      for (const auto& s : *sequences) {
        if (const std::optional<FinishReason> reason = s->Overdue(now); reason.has_value()) end(*s, *reason);
      }
    }
  }

  // Gives `admission` what its predictions are made of.
  void Inform(Admission& admission) const;

  // A step that was not planned here, such as one to warm up.
  void Learn(const StepShape& shape, double ms) { costs_.Observe(shape, ms); }
  const CostModel& costs() const { return costs_; }
  double LongestStepMs() const;                      // that options and memory allow, as far as is known
  const StepShape& shape() const { return shape_; }  // of the step that Plan or TakeAhead has last given
  // Tokens served, weighted as fairness counts them, to a tenant that is known; for tests and reports.
  double served(const std::string& tenant, Urgency urgency) const;

 private:
  struct Tenant {
    std::string name;
    double weight = 1.0;
    int32_t live = 0;
    std::array<double, kUrgencies> served = {};  // tokens / weight
    std::array<int32_t, kUrgencies> active = {};
  };

  int32_t TenantOf(const Sequence& s);
  void Charge(const Sequence& s, double tokens);
  void Admit(SteadyTime now, Batch& batch);
  size_t NextToAdmit(SteadyTime now, bool* aged) const;
  Tier CostliestRunningTier() const;
  bool Before(const Sequence& a, const Sequence& b, Tier costliest) const;
  bool MayRun(const Sequence& s) const;
  bool Grows(const Sequence& s) const;
  bool TakeBlocks(Sequence& s);
  size_t Sharable(const Sequence& s) const;
  void GrowAll(Batch& batch);
  void Preempt(Sequence& s);
  int32_t PrefillBudget(const StepShape& decoding, Urgency urgency, int32_t all) const;
  void CountNotBatch(SteadyTime now);
  void OpenRounds(bool drafted, Batch& batch);
  // A step that is planned; `ahead`: behind the one that is being computed, which is that of the sequences' fields.
  struct Planning {
    Batch& batch;
    StepShape& shape;
    bool ahead;
    StepShare& ShareOf(Sequence& s) const { return ahead ? s.ahead : s; }
    int32_t Computed(const Sequence& s) const { return s.computed + (ahead ? s.kept_rows : 0); }
    int32_t Drafted(const Sequence& s) const {
      const bool drafts = ahead && s.step_rows > 0 && s.step_use == Sequence::Use::kDraft;
      return static_cast<int32_t>(s.round.drafts.size()) + (drafts ? 1 : 0);
    }
  };
  bool TextFollows(const Batch& batch);
  bool PlanDrafts(const Planning& next);
  int32_t RowsForDrafts(const Batch& batch) const;
  int32_t RoomFor(Sequence& s, int32_t drafts, Batch& batch);
  static void AddDecodeRows(Sequence& s, const Planning& next);
  static void AddRows(Sequence& s, int32_t rows, const Planning& next);
  void SetBlocks(const Sequence& s, Batch& batch) const;
  void Release(Sequence& s);

  BlockPool& pool_;
  const SchedulerOptions options_;
  const TenantWeights weights_;  // 1 for tenants that it does not name
  CostModel costs_;
  std::vector<int32_t> free_slots_;  // a stack
  std::vector<std::unique_ptr<Sequence>> running_;
  std::vector<std::unique_ptr<Sequence>> waiting_;
  std::vector<Sequence*> admitted_, preempted_;
  std::vector<Tenant> tenants_;
  absl::flat_hash_map<std::string, int32_t> tenant_ids_;
  std::array<int32_t, kUrgencies> running_of_ = {};
  double recent_not_batch_ = 0.0;  // the most sequences at once that were not BATCH, fading with time
  SteadyTime not_batch_counted_;   // when that was brought up to date
  int since_aged_admission_ = 0;   // admissions that went before an old one
  uint64_t turns_ = 0, admissions_ = 0;
  bool nothing_fits_ = false;  // nor will it until something arrives or leaves
  StepShape shape_, ahead_shape_;
  Rounds rounds_;
};

}  // namespace dejavu

#endif  // ENGINE_SCHEDULING_SCHEDULER_H_
