// Recorder: what the engine writes down for those who watch it: totals, metrics and the trace of its steps. The engine
// thread writes without locks; FillStats, metrics() and trace() may be read by any thread.
#ifndef ENGINE_SERVING_RECORDER_H_
#define ENGINE_SERVING_RECORDER_H_

#include <cstdint>

#include "engine/metrics.h"
#include "engine/model/batch.h"
#include "engine/options.h"
#include "engine/scheduling/block_pool.h"
#include "engine/scheduling/cost_model.h"
#include "engine/scheduling/scheduler.h"
#include "engine/scheduling/sequence.h"
#include "engine/stats.h"
#include "engine/step_trace.h"
#include "kernels/base/clock.h"
#include "kernels/base/seq_lock.h"
#include "kernels/communicator.h"

namespace dejavu {

// One step, at its end, in the order of time.
struct StepTimes {
  SteadyTime start;     // it was planned from here on,
  SteadyTime planned;   // its shadow ran from here on, where it has one,
  SteadyTime shadowed;  // it ran from here on, or the device came to it later:
  SteadyTime since;     // from here on the device had nothing else to do;
  SteadyTime done;      // its results had come, and were handed out until now
};

struct StepFacts {
  int64_t step = 0;  // its number
  StepShape shape;
  int32_t rows = 0, shadow_rows = 0;
  int64_t weight_bytes = 0;  // read; 0: not known
};

class Recorder {
 public:
  // The metric edges of `options` have been checked.
  explicit Recorder(const MetricsOptions& options);

  EngineMetrics& metrics() { return metrics_; }
  const EngineMetrics& metrics() const { return metrics_; }
  const StepTrace& trace() const { return trace_; }
  // All but what others count: admission and the costs.
  void FillStats(EngineStats* stats) const;

  // Engine thread, from here on.

  void CountStep() { totals_.steps.Add(1); }  // as soon as it has been computed
  void NoteStep(const StepTimes& times, const StepFacts& facts);
  // `s` gets a token at `now`, in that step; its fields are those of the token before. `first`: of those that the step
  // gives it, which a client gets together.
  void NoteToken(const Sequence& s, SteadyTime now, int64_t step, bool first);
  void NotePromptTokens(int32_t tokens) { totals_.prompt_tokens.Add(tokens); }
  // For the first time: its prompt's prefix was looked for, and so much of it was there.
  void NoteAdmission(const Sequence& s) {
    metrics_.prefix_query_tokens.Add(s.keys.empty() ? 0 : s.prompt_tokens());
    totals_.cached_prompt_tokens.Add(s.computed);
  }
  void NotePreemptions(int64_t count) { totals_.preemptions.Add(count); }
  // So many keys and values of a step were beyond the range of the cache's type. The log says so once.
  void NoteSaturated(int64_t count);
  // `s` has left, with its Finish filled in.
  void NoteEnd(const Sequence& s, bool waiting);
  void NoteSpeculation(const SpeculationTotals& totals) { speculation_.Store(totals); }
  // What runs, waits and is free now.
  void NoteState(const Scheduler& scheduler, const BlockPool& pool, const CommunicatorStats& communication);
  void NoteCosts(const CostModel& costs) { totals_.cost_steps.Set(costs.steps()); }

 private:
  void TraceStep(const StepTimes& times, const StepFacts& facts, SteadyTime end);

  const MetricsOptions options_;
  EngineMetrics metrics_;
  StepTrace trace_;
  bool warned_of_saturation_ = false;
  struct {
    Counter<int64_t> steps, prompt_tokens, generated_tokens, cached_prompt_tokens, preemptions, cost_steps;
    Counter<int32_t> running, free_blocks, cached_blocks, blocks;
    Counter<int64_t> oldest_arrival;  // of those that wait, as the clock counts; 0: nobody
    Counter<int64_t> all_reduces, all_reduce_ns;
  } totals_;
  SeqLock<SpeculationTotals> speculation_;
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_RECORDER_H_
