// What an engine needs to know before it starts. Read once, passed down. Defaults suit a small server.
#ifndef ENGINE_OPTIONS_H_
#define ENGINE_OPTIONS_H_

#include <cstdint>
#include <string>

namespace dejavu {

struct EngineOptions {
  std::string model;               // as ModelOptions has it (engine/load/loaded_model.h)
  std::string weights = "stored";  // type of the matrices in memory: stored, fp32, fp16, bf16 or int8
  // Predictor file; empty: predictor.safetensors in the model's directory, if there is one, or a synthetic model's own;
  // "none": none even then.
  std::string predictor;
  bool shadow_fallback = true;  // a layer whose shadow checks fail runs EXACT until they pass again
  std::string device = "auto";  // auto | cpu | cuda
  int threads = 0;              // CPU threads of the step; 0: one per CPU that this process may use
  bool pin_threads = true;      // one CPU per thread

  // Ranks that hold the model: threads of this process, each with its part of the CPUs or a GPU of its own, or the
  // processes that mpirun started. 0: those, or one.
  int tensor_parallel = 0;
  double peer_timeout_s = 3.0;  // a rank that others wait for longer means that the engine has failed; 0: never

  int max_batch = 16;             // sequences that run at once
  int max_step_tokens = 256;      // rows of one step: decode rows and prefill chunks together
  int prefill_chunk_tokens = 64;  // the most prompt tokens of one sequence in a step
  int score_rows = 64;            // prompt positions that one step may score: each costs a row of logits

  // The door; 0: no limit.
  int max_waiting_requests = 256;  // queue; a request beyond it is refused
  int64_t max_waiting_tokens = 0;  // of the prompts in the queue
  int tenant_max_waiting_requests = 0;
  int64_t tenant_max_waiting_tokens = 0;
  double deadline_slack = 1.0;  // refused: what is predicted to take longer than so many times what its deadline leaves

  // Scheduling; see engine/scheduling/scheduler.h.
  double inter_token_target_ms = 0.0;
  double prefill_share = 0.75;
  double ageing_s = 10.0;
  std::string tenant_weights;  // such as "free=1,paying=3": shares of what tenants are served; 1 for others
  bool prefix_cache = true;

  // What is counted of the engine (engine/serving/metrics.h). Targets of a request, in ms; 0: none.
  bool count_metrics = true;  // false only to see what counting costs
  std::string metric_edges;   // as MetricEdgesFrom has it
  double slo_ttft_ms = 0.0;   // to its first token
  double slo_itl_ms = 0.0;    // between its tokens, on average

  double watchdog_s = 300.0;  // a step that takes longer means that the engine has failed; 0: never
  std::string fault;          // for tests: throw@STEP or hang@STEP

  int kv_block_tokens = 16;       // positions per KV block
  std::string kv_dtype = "fp16";  // of keys and values: fp16 or fp32
  bool kv_overcommit = false;     // take blocks as sequences grow, and compute the youngest again where none is left
  int64_t kv_mib = 0;  // memory for keys and values; 0: max_batch sequences of full context, or what is left for them

  double memory_share = 0.9;  // of the device's free memory: all that the engine takes must fit into it
};

}  // namespace dejavu

#endif  // ENGINE_OPTIONS_H_
