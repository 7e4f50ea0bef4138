// Scheduler and admission, as the engine runs them, on a virtual clock: what a server with given costs would do with
// given arrivals. For planning capacity, and for tests that no real clock could repeat.
#ifndef ENGINE_SIM_SIMULATOR_H_
#define ENGINE_SIM_SIMULATOR_H_

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "engine/request.h"
#include "engine/scheduling/admission.h"
#include "engine/scheduling/cost_model.h"
#include "engine/scheduling/scheduler.h"
#include "engine/sim/quantile_counter.h"

namespace dejavu {

struct SimRequest {
  double arrival_s = 0.0;
  int32_t prompt_tokens = 1;
  int32_t output_tokens = 1;   // when the model ends it
  int32_t max_new_tokens = 1;  // what it asked for; at least output_tokens
  Urgency urgency = Urgency::kNormal;
  std::string tenant;
  Tier tier = Tier::kDense;
  double deadline_s = 0.0;           // after its arrival; 0: none
  int32_t shared_prefix_tokens = 0;  // that all requests of one prefix id begin with
  int32_t prefix_id = 0;
};

struct SimOptions {
  SchedulerOptions scheduler;
  AdmissionOptions admission;
  CostParameters costs;  // the truth, which the scheduler learns
  int32_t kv_blocks = 1024;
  int32_t block_tokens = 16;
  int32_t context = 2048;
  bool prefix_cache = true;
  // What goodput counts: requests whose first token and whose mean inter-token time were that fast. 0: any.
  double ttft_target_ms = 0.0, inter_token_target_ms = 0.0;
  // Of each request that is DENSE or EXACT; texts have nothing to be looked up. How often a draft is right.
  SpeculationParams speculation = {SpeculationMode::kOff, Tier::kHigh, /*lookup=*/false, 6};
  double draft_acceptance = 0.9;
};

struct SimClass {
  QuantileCounter queue_ms, ttft_ms, inter_token_ms;
  int64_t finished = 0, good = 0;
};

struct SimResult {
  double seconds = 0.0;  // of virtual time
  int64_t steps = 0;
  Account account;
  std::array<SimClass, kUrgencies> of_urgency;
  SimClass all;
  struct Served {
    int64_t prompt_tokens = 0, output_tokens = 0;
  };
  std::map<std::string, Served> tenants;  // while the arrivals lasted
  double longest_queue_age_s = 0.0;
  int32_t most_kv_blocks = 0, most_waiting = 0;
  int64_t cached_prompt_tokens = 0, preemptions = 0;
  SpeculationTotals speculation;

  double goodput_per_s() const { return seconds > 0.0 ? static_cast<double>(all.good) / seconds : 0.0; }
};

// `next` gives the requests in order of arrival, then nothing. `progress`, if any, hears the virtual time now and then.
SimResult Simulate(const SimOptions& options, const std::function<std::optional<SimRequest>()>& next,
                   const std::function<void(double)>& progress = nullptr);

}  // namespace dejavu

#endif  // ENGINE_SIM_SIMULATOR_H_
