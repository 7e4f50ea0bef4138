// From options to an engine that serves, or to a rank that follows one.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "engine/load/loaded_model.h"
#include "engine/planning/memory_plan.h"
#include "engine/serving/step_engine.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/target.h"
#include "kernels/mpi/open_mpi.h"
#include "spdlog/spdlog.h"

namespace dejavu {
namespace {

absl::StatusOr<GroupOptions> ForGroup(const EngineOptions& o, const OptConfig& config, int32_t sampled_vocab) {
  if (!o.cpu_target.empty()) RETURN_IF_ERROR(cpu::LimitTarget(o.cpu_target));
  GroupOptions group;
  group.model = {o.model, o.weights, o.predictor};
  group.model.map_weights = o.map_weights;
  group.device = o.device;
  group.threads = o.threads;
  group.pin = o.pin_threads;
  group.ranks = o.tensor_parallel;
  group.timeout_s = o.peer_timeout_s;
  group.max_rows = o.scheduler.max_step_tokens;
  group.max_logit_rows = o.scheduler.max_batch + o.scheduler.score_rows;
  group.slots = group.max_audits = o.scheduler.max_batch;
  group.blocks_per_slot = (config.context + o.kv.block_tokens - 1) / o.kv.block_tokens;
  group.block_tokens = o.kv.block_tokens;
  group.candidates = sampled_vocab > 0 ? std::min(sampled_vocab, config.vocab) : config.vocab;
  ASSIGN_OR_RETURN(group.kv_dtype, ParseKvType(o.kv.dtype));
  group.plan_memory = [o, config](const Backend& backend, int rank, int ranks) -> absl::StatusOr<GroupOptions::Room> {
    ASSIGN_OR_RETURN(const MemoryPlan plan, PlanMemory(o, config, backend, rank, ranks));
    if (rank == 0 && backend.ReadsHostMemory()) spdlog::info("CPU kernels: {}", cpu::DescribeTarget());
    const std::string who = ranks > 1 ? absl::StrCat("rank ", rank, " of ", ranks, ", ") : "";
    spdlog::info("{}{}: {}", who, backend.Description(), plan.ToString());
    return GroupOptions::Room{plan.kv_blocks, plan.draft_bytes > 0};
  };
  return group;
}

// What a model's files say that Transformers takes otherwise, or warns of.
void WarnOf(const std::string& model, const OptConfig& config, const OptWeights& weights) {
  if (config.tied && weights.has_own_head()) {
    spdlog::warn(
        "{}: lm_head.weight differs from embed_tokens.weight and is used, although config.json says that they are one "
        "(tie_word_embeddings)",
        model);
  }
  if (!config.unused_settings.empty()) {
    constexpr size_t kShown = 16;
    const auto& names = config.unused_settings;
    const auto shown = absl::MakeConstSpan(names).first(std::min(names.size(), kShown));
    spdlog::warn("{}/generation_config.json: {}{} without effect: requests say how tokens are chosen", model,
                 absl::StrJoin(shown, ", "),
                 names.size() > kShown ? absl::StrCat(" and ", names.size() - kShown, " more") : "");
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options, int32_t sampled_vocab,
                                                       const LoadProgress& progress) {
  const SteadyTime start = std::chrono::steady_clock::now();
  RETURN_IF_ERROR(CheckOptions(options));
  ASSIGN_OR_RETURN(const Fault fault, ParseFault(options.fault));
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  ASSIGN_OR_RETURN(const GroupOptions group_options, ForGroup(options, config, sampled_vocab));
  ASSIGN_OR_RETURN(std::unique_ptr<ModelGroup> group, ModelGroup::Create(group_options, config, progress));
  WarnOf(options.model, config, group->loaded().weights);
  if (options.draft_weights == kInt8Drafts && group->draft_weight_bytes() == 0) {
    spdlog::warn("speculation.draft_weights is int8, but there are none: {}",
                 group->loaded().predictor.has_value() ? "the weights are int8 anyway" : "no predictor drafts");
  }
  auto engine = std::make_unique<StepEngine>(options, config, group_options.candidates, fault, std::move(group));
  engine->SetLoadSeconds(SecondsSince(start));
  engine->Start();
  return engine;
}

bool FollowsAnEngine(const EngineOptions& options) {
  return UnderMpirun() && options.tensor_parallel != 1 && MpirunRank() > 0;
}

absl::Status FollowEngine(const EngineOptions& options, int32_t sampled_vocab, absl::FunctionRef<void()> on_loaded) {
  RETURN_IF_ERROR(CheckOptions(options));
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  ASSIGN_OR_RETURN(const GroupOptions group_options, ForGroup(options, config, sampled_vocab));
  return ModelGroup::Follow(group_options, config, on_loaded);
}

}  // namespace dejavu
