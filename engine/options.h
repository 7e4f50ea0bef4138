// What an engine needs to know before it starts. Read once, passed down. Defaults suit a small server. The limits of a
// number stand beside it; CheckOptions and the configuration's table (config/option_table.cc) both read them here.
#ifndef ENGINE_OPTIONS_H_
#define ENGINE_OPTIONS_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dejavu {

// Inclusive.
struct Limits {
  double least = 0.0;
  double most = 0.0;
};
inline constexpr Limits kTimeLimits = {0.0, 1e6};  // of what is given in seconds or milliseconds

// Which sequences run, and what a step holds; see engine/scheduling/scheduler.h.
struct SchedulerOptions {
  static constexpr Limits kMaxBatch = {1, 1024}, kMaxStepTokens = {1, 1 << 16}, kPrefillChunkTokens = {1, 1 << 16};
  static constexpr Limits kPrefillShare = {0.0, 1e6}, kSpeculationGain = {0.0, 100.0};

  int32_t max_batch = 16;             // sequences that run at once
  int32_t max_step_tokens = 256;      // rows of one step: decode rows and prefill chunks together; at least max_batch
  int32_t prefill_chunk_tokens = 64;  // the most prompt tokens of one sequence in a step
  int32_t least_prefill_tokens = 8;   // of all sequences in a step, at least, whatever the target says
  int32_t score_rows = 64;            // prompt positions that one step may score: each costs a row of logits
  // What prompts may add to a step while others decode: up to the tightest target between two tokens. Where neither
  // requests nor this option name one (0), that share of the step without prompts.
  double inter_token_target_ms = 0.0;
  double prefill_share = 0.75;
  double ageing_s = 10.0;
  // Take blocks as sequences grow, and compute the youngest again where none is left: but for those whose tokens that
  // would change.
  bool overcommit = false;
  std::string tenant_weights;  // such as "free=1,paying=3": shares of what tenants are served; 1 for others
  // Of requests that leave speculation to the engine (engine/scheduling/rounds.h): the share of tokens per second that
  // must be gained.
  double speculation_gain = 0.05;
};

// By tenant. INVALID_ARGUMENT for anything but tenant=weight, separated by commas.
using TenantWeights = std::vector<std::pair<std::string, double>>;
absl::StatusOr<TenantWeights> ParseTenantWeights(absl::string_view text);

// Who may come in; see engine/scheduling/admission.h.
struct AdmissionOptions {
  static constexpr Limits kMaxWaitingRequests = {1, 1 << 16}, kTenantMaxWaitingRequests = {0, 1 << 16};
  static constexpr Limits kMaxWaitingTokens = {0, 1e12}, kDeadlineSlack = {0.0, 1e6};

  int32_t max_waiting_requests = 256;  // a request beyond it is refused; three quarters of it for BATCH
  int64_t max_waiting_tokens = 0;      // of the prompts in the queue; 0: no limit, as in the next two
  int32_t tenant_max_waiting_requests = 0;
  int64_t tenant_max_waiting_tokens = 0;
  // A request is refused when the predicted time is more than so many times what its deadline leaves. 0: never.
  double deadline_slack = 1.0;
};

// Memory for keys and values.
struct KvOptions {
  static constexpr Limits kBlockTokens = {1, 1024}, kMemoryMib = {0, 1 << 24};

  int32_t block_tokens = 16;   // positions per block
  std::string dtype = "fp16";  // fp16 or fp32
  bool prefix_cache = true;    // prompts that begin alike share blocks
  int64_t memory_mib = 0;      // 0: max_batch sequences of full context, or what is left for them
};

// What is counted of the engine; see engine/metrics.h. Targets of a request in ms; 0: none.
struct MetricsOptions {
  static constexpr Limits kSlo = {0.0, 1e9};

  bool count = true;         // false only to see what counting costs
  std::string edges;         // as MetricEdgesFrom has it
  double slo_ttft_ms = 0.0;  // to its first token
  double slo_itl_ms = 0.0;   // between its tokens, on average
};

// EngineOptions::draft_weights.
inline constexpr char kAutoDrafts[] = "auto", kStoredDrafts[] = "stored", kInt8Drafts[] = "int8";

struct EngineOptions {
  static constexpr Limits kThreads = {0, 1024}, kTensorParallel = {0, 64}, kMemoryShare = {0.01, 1.0};
  static constexpr Limits kWatchdog = {-1.0, 1e6};

  std::string model;               // as ModelOptions has it (engine/load/loaded_model.h)
  std::string weights = "stored";  // type of the matrices in memory: stored, fp32, fp16, bf16 or int8
  // Predictor file; empty: predictor.safetensors in the model's directory, if there is one, or a synthetic model's own;
  // "none": none even then.
  std::string predictor;
  // What drafts of a predicted tier compute with: stored, the model's weights; int8, DraftWeights; auto, int8 where the
  // memory does for both those and keys and values.
  std::string draft_weights = kAutoDrafts;
  bool shadow_fallback = true;  // a layer whose shadow checks fail runs EXACT until they pass again
  bool map_weights = true;      // compute with a mapped file of dejavu-convert where that can be (ModelOptions)
  std::string device = "auto";  // auto | cpu | cuda
  int threads = 0;              // CPU threads of the step; 0: as many as are worth it (kernels/base/processors.h)
  std::string cpu_target;       // instruction set of the CPU's kernels (kernels/cpu/target.h); empty: the best
  bool pin_threads = true;      // one CPU per thread, where the threads take all CPUs of the process
  double memory_share = 0.9;    // of the device's free memory: all that the engine takes must fit into it

  // Ranks that hold the model: threads of this process, each with its part of the CPUs or a GPU of its own, or the
  // processes that mpirun started. 0: those, or one.
  int tensor_parallel = 0;
  double peer_timeout_s = 3.0;  // a rank that others wait for longer means that the engine has failed; 0: never

  SchedulerOptions scheduler;
  AdmissionOptions admission;
  KvOptions kv;
  MetricsOptions metrics;

  // A step that takes longer means that the engine has failed; 0: never; -1: as engine/serving/watchdog.h has it.
  double watchdog_s = -1.0;
  std::string fault;  // for tests: throw@STEP, hang@STEP or slow@MS
};

// INVALID_ARGUMENT with the option, its value and its limits.
absl::Status CheckOptions(const EngineOptions& options);

}  // namespace dejavu

#endif  // ENGINE_OPTIONS_H_
