// StepTrace: keeps how the last steps and the slowest tokens spent their time. The engine thread writes fixed arrays,
// without locks or allocation; any thread reads.
#ifndef ENGINE_STEP_TRACE_H_
#define ENGINE_STEP_TRACE_H_

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "kernels/base/clock.h"
#include "kernels/base/seq_lock.h"

namespace dejavu {

struct StepRecord {
  int64_t step = 0;  // its number, from 1; 0: none
  SteadyTime start;
  // From start to the end of handing out, and its parts, in the order of time.
  float total_ms = 0.0f, plan_ms = 0.0f, shadow_ms = 0.0f, forward_ms = 0.0f, handout_ms = 0.0f;
  int32_t decode_rows = 0, prefill_rows = 0, shadow_rows = 0;
  int64_t weight_bytes = 0;  // read; 0: not known
};

// The longest time between two tokens of one request that ended in `step`.
struct SlowToken {
  StepRecord step;
  uint64_t sequence = 0;  // the engine's id of the request
  SteadyTime token;       // when it came
  float gap_ms = 0.0f;    // since the one before
  int32_t steps = 0;      // that the engine ran in the gap, `step` included
  int32_t generated_tokens = 0;
};

class StepTrace {
 public:
  static constexpr int kSteps = 2048;
  static constexpr int kSlowTokens = 64;
  static constexpr std::chrono::seconds kWhile{300};

  // Engine thread. A step is noted after its tokens.
  void NoteToken(uint64_t sequence, SteadyTime token, SteadyTime previous, int32_t steps, int32_t generated_tokens) {
    if (token - previous <= gap_) return;
    gap_ = token - previous;
    slowest_.sequence = sequence;
    slowest_.token = token;
    slowest_.steps = steps;
    slowest_.generated_tokens = generated_tokens;
  }
  void NoteStep(const StepRecord& step);

  // Any thread, as all below. How many steps have been noted.
  int64_t noted() const { return noted_.load(std::memory_order_acquire); }
  // The steps after the first `from`, in order; at most the last kSteps.
  std::vector<StepRecord> StepsAfter(int64_t from) const;
  // Those of the last one to two times kWhile, slowest first; at most kSlowTokens.
  std::vector<SlowToken> SlowestTokens() const;

 private:
  // The slowest tokens of one while.
  struct Window {
    std::array<SeqLock<SlowToken>, kSlowTokens> tokens;
    // Engine thread.
    std::array<float, kSlowTokens> gaps{};
    int fastest = 0;  // of them
  };
  void Keep(const SlowToken& token);

  std::array<SeqLock<StepRecord>, kSteps> steps_;
  std::atomic<int64_t> noted_{0};
  std::array<Window, 2> windows_;

  // Engine thread.
  int current_ = 0;
  SteadyTime current_since_;
  SlowToken slowest_;  // of the current step
  SteadyTime::duration gap_{0};
};

}  // namespace dejavu

#endif  // ENGINE_STEP_TRACE_H_
