// EngineStats: what an engine says of itself at a moment. Plain data; any thread.
#ifndef ENGINE_STATS_H_
#define ENGINE_STATS_H_

#include <array>
#include <cstdint>

#include "engine/refusal.h"
#include "engine/request.h"
#include "engine/speculation.h"

namespace dejavu {

// Of requests that were handed over, or refused in front of the engine once they had been read, each sample by itself:
// received = finished + refused + cancelled + failed + live, always.
struct Account {
  int64_t received = 0;
  int64_t finished = 0;
  int64_t cancelled = 0;  // by the client, or its deadline
  int64_t failed = 0;
  int64_t live = 0;
  std::array<int64_t, kRefusals> refused = {};

  int64_t refused_total() const;
};

// What a step costs, as the engine has learned it (engine/scheduling/cost_model.h).
struct CostParameters {
  double dense_ms = 0.0, exact_ms = 0.0, predicted_ms = 0.0;  // a step by itself
  double row_ms = 0.0, prefill_token_ms = 0.0, context_token_ms = 0.0;
  double check_row_ms = 0.0;  // of a draft that is checked, beside the row of its sequence
  double draft_ms = 0.0;      // a step that drafts by itself
};

// A snapshot; the fields are read one by one and belong to the same moment only when nothing runs.
struct EngineStats {
  int32_t running = 0;
  int32_t waiting = 0;
  int32_t kv_blocks_total = 0;
  int32_t kv_blocks_free = 0;    // without a user
  int32_t kv_blocks_cached = 0;  // of those, holding a prompt's prefix that may be wanted again
  int64_t steps = 0;
  int64_t prompt_tokens = 0;
  int64_t generated_tokens = 0;
  int64_t cached_prompt_tokens = 0;  // not computed: their blocks were there
  int64_t preemptions = 0;
  Account account;
  std::array<int32_t, kUrgencies> waiting_of = {};
  int64_t waiting_tokens = 0;  // of their prompts
  double oldest_wait_s = 0.0;
  int64_t all_reduces = 0;    // of rank 0, when a step last ended, as the next
  int64_t all_reduce_ns = 0;  // waiting for the others included
  int32_t ranks = 1;
  CostParameters costs;
  int64_t cost_steps = 0;  // that the costs were learned from
  SpeculationTotals speculation;
};

}  // namespace dejavu

#endif  // ENGINE_STATS_H_
