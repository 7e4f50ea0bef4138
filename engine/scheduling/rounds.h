// Rounds: which sequences draft next, from where and how far. A round is some drafts and one step that checks them; of
// those that run, all that draft begin together and are checked together, so that a step drafts or makes text, never
// both. A state machine without a clock. Engine thread only.
//
// ALWAYS drafts as many tokens as there is room for. AUTO asks what a round would bring: from how often drafts were
// right lately, of the sequence and of all, and from what steps of each kind take at the present batch, which is
// learned beside CostModel. The round is run whose tokens per second are the most, if they are `speculation_gain` more
// than without. Whoever runs and does not draft waits meanwhile, and counts in that sum; nobody waits beyond the target
// between two tokens. Where nothing is expected of a round, one is tried now and then, ever less often while they fail.
#ifndef ENGINE_SCHEDULING_ROUNDS_H_
#define ENGINE_SCHEDULING_ROUNDS_H_

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "engine/options.h"
#include "engine/scheduling/cost_model.h"
#include "engine/scheduling/sequence.h"

namespace dejavu {

class Rounds {
 public:
  // Rows of a step that checks. More would be no gain on a CPU, and on a GPU they are computed in another order.
  static constexpr int32_t kMostRows = 32;

  explicit Rounds(const SchedulerOptions& options);

  using Running = std::vector<std::unique_ptr<Sequence>>;

  // While no round is open and no prompt waits: opens those that are wanted, with `extra_rows` drafts together at most.
  // `room` says for how many of so many drafts a sequence has blocks. Drafts that are looked up are there at once.
  void Open(const Running& running, const CostModel& costs, int32_t extra_rows,
            absl::FunctionRef<int32_t(Sequence&, int32_t)> room);
  // A prompt waits: rounds of AUTO end with the drafts that they have.
  static void CutShort(const Running& running);
  // Whether a round might be opened after the step that is planned now. Called once for each step.
  bool MayOpen(const Running& running);

  // A step of that shape has been computed; before its rounds are closed.
  struct StepYield {
    int32_t tokens = 0;       // that those who decode have got by it
    Tier tier = Tier::kFast;  // the dearest that was asked for: DENSE is checked as EXACT
  };
  void NoteStep(const StepShape& shape, double ms, const StepYield& yield, const CostModel& costs);
  // The round of `s` has been checked.
  void Close(Sequence& s);

  const SpeculationTotals& totals() const { return totals_; }

 private:
  // How much longer steps of one kind take than CostModel says, which knows nothing of the union of what rows select.
  struct Ratios {
    std::array<double, kMostRows + 1> of_rows = {};  // 0: none has run
    void Note(int32_t rows, double ratio);
    double At(int32_t rows) const;  // of the nearest that has run
  };
  // A sequence that might draft.
  struct Candidate {
    Sequence* sequence;
    int32_t most;      // drafts
    double tier_odds;  // 0: no tier drafts
    int32_t lookup;    // drafts that there are to be looked up
    double lookup_odds;
  };
  // What runs: how many rows decode, how many of them are DENSE, and the tightest targets.
  struct Present {
    int32_t rows = 0, dense = 0;
    int64_t context_tokens = 0;
    double wait_ms = 0.0, burst_ms = 0.0;  // of those that do not draft, and of those that do
  };
  struct Plan {
    double rate = 0.0;   // tokens per ms
    int32_t drafts = 0;  // of the tier, each; 0: none
    size_t members = 0;  // the first of candidates_
    bool lookup = false;
  };

  void OpenAlways(const Running& running, int32_t* extra_rows, absl::FunctionRef<int32_t(Sequence&, int32_t)> room);
  void OpenAuto(const Running& running, const CostModel& costs, int32_t extra_rows,
                absl::FunctionRef<int32_t(Sequence&, int32_t)> room);
  Present Look(const Running& running, const CostModel& costs) const;
  Plan BestPlan(const CostModel& costs, const Present& now, int32_t extra_rows, double least_odds) const;
  double StepMs(const CostModel& costs, const StepShape& shape) const;
  double Odds(const Sequence& s, DraftSource source) const;
  int32_t MostDrafts(const Sequence& s) const;

  const SchedulerOptions options_;
  std::array<DraftOdds, kAllTiers.size()> tier_odds_;  // of all sequences, as the next
  DraftOdds lookup_odds_;
  std::array<Ratios, 5> ratios_;
  std::vector<Candidate> candidates_;  // scratch
  int32_t idle_steps_ = 0, trial_every_;
  int32_t steps_in_rounds_ = 0;  // since one without, which shows what rounds are held against
  int32_t rest_ = 0;             // so many steps AUTO need not be asked again
  double round_ms_ = 0.0;        // of the drafts that are open
  SpeculationTotals totals_;
};

// What followed the last few of `tokens` when they came before, at most `most` tokens, to `drafts`: of the longest
// match the latest.
void LookUp(const std::vector<int32_t>& tokens, int32_t most, std::vector<int32_t>* drafts);

}  // namespace dejavu

#endif  // ENGINE_SCHEDULING_ROUNDS_H_
