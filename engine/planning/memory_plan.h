// MemoryPlan: what an engine is going to take of its device, known before anything is loaded. Weights and predictor
// come first, then the activations of the largest step; keys and values get what is wanted of the rest.
#ifndef ENGINE_PLANNING_MEMORY_PLAN_H_
#define ENGINE_PLANNING_MEMORY_PLAN_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "engine/model/opt_config.h"
#include "engine/model/shard.h"
#include "engine/options.h"
#include "kernels/backend.h"

namespace dejavu {

struct MemoryPlan {
  int64_t free_bytes = 0;    // of the device, before
  int64_t budget_bytes = 0;  // EngineOptions::memory_share of it
  int64_t weight_bytes = 0;  // a synthetic model's, as the next two, without the few percent that alignment takes
  int64_t predictor_bytes = 0;
  int64_t draft_bytes = 0;  // DraftWeights, exactly; 0: none
  int64_t activation_bytes = 0;
  int64_t kv_bytes = 0;  // 0 for a rank without heads, which shares the numbers of the others' blocks
  int32_t kv_blocks = 0;

  // One line for people, in GiB.
  std::string ToString() const;
};

// Of OptModel, the predictor's masks and the logits, for steps of the largest size.
int64_t ActivationBytes(const EngineOptions& options, const ModelShape& shape, const Shard& shard);

// KV blocks that are wanted where `left` bytes are left for them: those of max_batch sequences, or fewer.
int64_t WantedBlocks(const EngineOptions& options, int64_t per_sequence, int64_t block_bytes, int64_t left);
// What DraftWeights, which would take `bytes`, get of `left` where keys and values want `kv_bytes` of it. With "auto"
// they get what those leave, or nothing.
int64_t BytesForDrafts(const EngineOptions& options, int64_t bytes, int64_t left, int64_t kv_bytes);

// What rank `rank` of `ranks` takes of its device. RESOURCE_EXHAUSTED with the sizes where the model, or with it one
// sequence of the full context, does not fit.
absl::StatusOr<MemoryPlan> PlanMemory(const EngineOptions& options, const OptConfig& config, const Backend& backend,
                                      int rank = 0, int ranks = 1);

}  // namespace dejavu

#endif  // ENGINE_PLANNING_MEMORY_PLAN_H_
