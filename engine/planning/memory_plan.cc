#include "engine/planning/memory_plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/load/loaded_model.h"
#include "engine/model/kv_cache.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

std::string Gib(int64_t bytes) { return absl::StrFormat("%.2f GiB", static_cast<double>(bytes) / (1 << 30)); }

}  // namespace

int64_t ActivationBytes(const EngineOptions& options, const ModelShape& shape, const Shard& shard) {
  const int64_t features = int64_t{shard.heads.count} * shape.head_dim;
  const int64_t row = 4 * (shape.hidden + features) + int64_t{2} * shard.neuron_count;
  const int64_t logits = int64_t{shard.vocab.count} + shape.hidden;
  return static_cast<int64_t>(sizeof(float)) *
         (options.scheduler.max_step_tokens * row +
          (options.scheduler.max_batch + options.scheduler.score_rows) * logits + options.scheduler.max_batch * row);
}

int64_t WantedBlocks(const EngineOptions& options, int64_t per_sequence, int64_t block_bytes, int64_t left) {
  const int64_t useful = options.scheduler.max_batch * per_sequence;
  const int64_t most = options.kv.memory_mib > 0 ? options.kv.memory_mib << 20 : std::max<int64_t>(left, 0);
  return block_bytes > 0 ? std::min(useful, most / block_bytes) : useful;
}

int64_t BytesForDrafts(const EngineOptions& options, int64_t bytes, int64_t left, int64_t kv_bytes) {
  if (options.draft_weights == kStoredDrafts) return 0;
  return options.draft_weights == kInt8Drafts || left - kv_bytes >= bytes ? bytes : 0;
}

std::string MemoryPlan::ToString() const {
  return absl::StrCat(
      "weights ", Gib(weight_bytes), draft_bytes > 0 ? absl::StrCat(" and, for drafts, ", Gib(draft_bytes)) : "",
      ", predictor ", Gib(predictor_bytes), ", activations ", Gib(activation_bytes), ", keys and values ",
      Gib(kv_bytes), " in ", kv_blocks, " blocks; ", Gib(budget_bytes), " of ", Gib(free_bytes), " free may be taken");
}

absl::StatusOr<MemoryPlan> PlanMemory(const EngineOptions& options, const OptConfig& config, const Backend& backend,
                                      int rank, int ranks) {
  ASSIGN_OR_RETURN(const DType kv_dtype, ParseKvType(options.kv.dtype));
  ASSIGN_OR_RETURN(const ModelBytes model,
                   MeasureModel({options.model, options.weights, options.predictor, rank, ranks}, config));
  ASSIGN_OR_RETURN(const Shard shard, MakeShard(config, nullptr, rank, ranks));
  MemoryPlan plan;
  plan.free_bytes = backend.FreeBytes();
  plan.budget_bytes = static_cast<int64_t>(options.memory_share * static_cast<double>(plan.free_bytes));
  plan.weight_bytes = model.weights;
  plan.predictor_bytes = model.predictor;
  plan.activation_bytes = ActivationBytes(options, config, shard);
  const int64_t left = plan.budget_bytes - plan.weight_bytes - plan.predictor_bytes - plan.activation_bytes;

  const int64_t block_bytes = KvCache::BlockBytes(config, options.kv.block_tokens, kv_dtype, shard.heads.count);
  const int64_t per_sequence = (config.context + options.kv.block_tokens - 1) / options.kv.block_tokens;
  const auto blocks = [&](int64_t bytes) { return WantedBlocks(options, per_sequence, block_bytes, bytes); };
  plan.draft_bytes = BytesForDrafts(options, model.drafts, left, blocks(left) * block_bytes);
  plan.kv_blocks = static_cast<int32_t>(blocks(left - plan.draft_bytes));
  plan.kv_bytes = plan.kv_blocks * block_bytes;
  if (left - plan.draft_bytes < plan.kv_bytes || plan.kv_blocks < per_sequence) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the memory of ", backend.Description(), " does not suffice: ", plan.ToString(), "; a sequence of the full ",
        "context of ", config.context, " tokens needs ", per_sequence, " blocks of ", block_bytes, " bytes (",
        ((per_sequence * block_bytes) >> 20) + 1, " MiB). What makes it smaller: weights (int8), ",
        options.draft_weights == kInt8Drafts && plan.draft_bytes > 0 ? "speculation.draft_weights (stored), " : "",
        "predictor (none), scheduler.max_step_tokens, ", options.kv.memory_mib > 0 ? "kv.memory_mib, " : "",
        "kv.dtype"));
  }
  return plan;
}

}  // namespace dejavu
