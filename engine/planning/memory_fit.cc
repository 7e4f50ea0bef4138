#include "engine/planning/memory_fit.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/load/loaded_model.h"
#include "engine/model/draft_weights.h"
#include "engine/model/kv_cache.h"
#include "engine/planning/memory_plan.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr double kGib = 1 << 30;
constexpr int64_t kMib = 1 << 20;

double GibOf(int64_t bytes) { return static_cast<double>(bytes) / kGib; }

}  // namespace

int64_t MemoryBytes(const PlanOptions& devices) { return static_cast<int64_t>(devices.memory_gib * kGib); }

absl::StatusOr<MemoryFit> MeasureFit(const PlannedModel& model, const EngineOptions& options,
                                     const PlanOptions& devices) {
  const OptConfig& config = model.config;
  ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseWeights(options.weights));
  MemoryFit fit;
  ASSIGN_OR_RETURN(fit.kv, ParseKvType(options.kv.dtype));
  if (devices.devices < 1 || devices.devices > std::min(config.ffn, config.vocab)) {
    return absl::InvalidArgumentError(absl::StrCat(devices.devices, " devices for ", config.ffn, " neurons and ",
                                                   config.vocab, " tokens: each needs one of both"));
  }
  fit.weights = dtype.value_or(model.converted.value_or(model.stored));
  fit.shard = FirstShard(config, devices.devices);
  fit.weight_bytes = RankShapes(config, fit.shard, fit.weights, model.stored).bytes();
  if (model.predictor.has_value()) fit.predictor_bytes = PredictorBytes(*model.predictor, config, fit.shard);
  fit.activations = ActivationBytes(options, config, fit.shard);
  fit.budget = static_cast<int64_t>(options.memory_share * static_cast<double>(MemoryBytes(devices)));
  const int64_t left = fit.budget - fit.weight_bytes.total() - fit.predictor_bytes.total() - fit.activations;

  fit.block_bytes = KvCache::BlockBytes(config, options.kv.block_tokens, fit.kv, fit.shard.heads.count);
  fit.per_sequence = (config.context + options.kv.block_tokens - 1) / options.kv.block_tokens;
  const auto blocks = [&](int64_t bytes) { return WantedBlocks(options, fit.per_sequence, fit.block_bytes, bytes); };
  if (model.predictor.has_value() && fit.weights != DType::kInt8) {
    fit.draft_bytes =
        BytesForDrafts(options, DraftWeights::Measure(config, fit.shard), left, blocks(left) * fit.block_bytes);
  }
  fit.for_kv = left - fit.draft_bytes;
  fit.blocks = blocks(fit.for_kv);
  return fit;
}

std::string WhyNot(const MemoryFit& fit, const ModelShape& shape) {
  const int64_t sequence = fit.per_sequence * fit.block_bytes;
  if (fit.for_kv < sequence) {
    return absl::StrFormat(
        "weights, predictor%s and activations of a rank take %.2f GiB and keys and values of one sequence of %d tokens "
        "%.2f GiB; %.2f GiB may be taken",
        fit.draft_bytes > 0 ? ", weights for drafts" : "", GibOf(fit.budget - fit.for_kv), shape.context,
        GibOf(sequence), GibOf(fit.budget));
  }
  if (fit.blocks < fit.per_sequence) {
    return absl::StrFormat("kv.memory_mib gives keys and values %.2f GiB; one sequence of %d tokens takes %.2f GiB",
                           GibOf(fit.blocks * fit.block_bytes), shape.context, GibOf(sequence));
  }
  return absl::StrFormat("kv.memory_mib gives keys and values %.2f GiB; the rest leaves them %.2f GiB",
                         GibOf(fit.blocks * fit.block_bytes), GibOf(fit.for_kv));
}

std::vector<PlanAlternative> FindAlternatives(const PlannedModel& model, const EngineOptions& options,
                                              const PlanOptions& devices, const MemoryFit& fit) {
  std::vector<PlanAlternative> found;
  const auto fits = [&](const EngineOptions& other, int count) {
    PlanOptions same = devices;
    same.devices = count;
    const absl::StatusOr<MemoryFit> measured = MeasureFit(model, other, same);
    return measured.ok() && measured->fits();
  };
  for (int count = devices.devices + 1; count <= kMaxPlanDevices; ++count) {
    if (!fits(options, count)) continue;
    found.push_back({absl::StrCat("--plan-devices ", count), absl::StrCat(count, " devices of this memory")});
    break;
  }
  for (const auto& [name, dtype] : {std::pair("fp16", DType::kFloat16), std::pair("int8", DType::kInt8)}) {
    EngineOptions other = options;
    other.weights = name;
    if (SizeOf(dtype) >= SizeOf(fit.weights) || !fits(other, devices.devices)) continue;
    found.push_back({absl::StrCat("--weights ", name), absl::StrCat("weights in ", Name(dtype))});
  }
  if (options.draft_weights == kInt8Drafts && fit.draft_bytes > 0) {
    EngineOptions other = options;
    other.draft_weights = kStoredDrafts;
    if (fits(other, devices.devices)) {
      found.push_back({"--speculation-draft-weights stored", "drafts with the model's own weights"});
    }
  }
  if (fit.kv == DType::kFloat32) {
    EngineOptions other = options;
    other.kv.dtype = "fp16";
    if (fits(other, devices.devices)) found.push_back({"--kv-dtype fp16", "keys and values in float16"});
  }
  if (options.kv.memory_mib > 0) {
    EngineOptions other = options;
    const int64_t least = (fit.per_sequence * fit.block_bytes + kMib - 1) / kMib;
    other.kv.memory_mib = std::max(least, std::min(options.kv.memory_mib, fit.for_kv / kMib));
    if (fits(other, devices.devices)) {
      found.push_back(
          {absl::StrCat("--kv-memory-mib ", other.kv.memory_mib),
           absl::StrCat("keys and values in ", other.kv.memory_mib, " MiB (", least, " hold one sequence)")});
    }
  }
  return found;
}

}  // namespace dejavu
