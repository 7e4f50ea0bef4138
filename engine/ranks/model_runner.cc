#include "engine/ranks/model_runner.h"

#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/model/kv_cache.h"
#include "engine/model/opt_config.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int32_t kBlockTokens = 16;

absl::StatusOr<GroupOptions> ForGroup(const ModelRunner::Options& options) {
  GroupOptions group;
  group.model = {options.model, options.weights, options.predictor};
  group.device = options.device;
  group.threads = options.threads;
  group.pin = options.pin;
  group.ranks = options.ranks;
  group.max_rows = group.max_logit_rows = options.max_rows;
  group.max_audits = options.max_audits;
  group.timeout_s = 0.0;  // between steps a tool does what takes long, and pings nobody
  group.slots = options.slots;
  group.block_tokens = kBlockTokens;
  group.blocks_per_slot = (options.window + kBlockTokens - 1) / kBlockTokens;
  ASSIGN_OR_RETURN(group.kv_dtype, ParseKvType(options.kv_dtype));
  const GroupOptions::Room room = {group.blocks_per_slot * options.slots, options.draft_weights};
  group.plan_memory = [room](const Backend&, int, int) { return room; };
  group.wrap_backend = options.wrap_backend;
  return group;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelRunner>> ModelRunner::Create(const Options& options, const LoadProgress& progress) {
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  if (options.window < 2 || options.window > config.context) {
    return absl::InvalidArgumentError(absl::StrCat("the window is ", options.window, "; it must be in 2 ... ",
                                                   config.context, ", the model's context"));
  }
  std::unique_ptr<ModelRunner> runner(new ModelRunner(options, config));
  ASSIGN_OR_RETURN(const GroupOptions group, ForGroup(options));
  ASSIGN_OR_RETURN(runner->group_, ModelGroup::Create(group, config, progress));
  runner->batch_ = std::make_unique<Batch>(group.max_rows, group.max_logit_rows, group.slots, group.blocks_per_slot);
  std::iota(runner->batch_->block_table.begin(), runner->batch_->block_table.end(), 0);
  runner->logits_.resize(static_cast<size_t>(options.max_rows) * config.vocab);
  runner->drawn_.resize(options.max_rows);
  runner->counts_ = runner->counts_ahead_ = runner->group_->predictor().MakeCounts();
  return runner;
}

absl::Status ModelRunner::Follow(const Options& options) {
  ASSIGN_OR_RETURN(const OptConfig config, LoadModelConfig(options.model));
  ASSIGN_OR_RETURN(const GroupOptions group, ForGroup(options));
  return ModelGroup::Follow(group, config, [] {});
}

absl::Status ModelRunner::SetPredictor(const PredictorData* data) {
  RETURN_IF_ERROR(group_->SetPredictor(data));
  counts_ = counts_ahead_ = group_->predictor().MakeCounts();
  return absl::OkStatus();
}

Batch& ModelRunner::StartBatch() {
  batch_->Clear();
  return *batch_;
}

absl::Span<const float> ModelRunner::Run() {
  group_->Forward(*batch_, {logits_.data(), drawn_.data(), &counts_});
  return absl::MakeConstSpan(logits_.data(), batch_->logit_rows.size() * config_.vocab);
}

void ModelRunner::Decode(int steps) {
  Batch& batch = *batch_;
  batch.draws.assign(batch.logit_rows.size(), {});
  std::vector<int32_t> drawn(batch.logit_rows.size()), drawn_ahead(drawn);
  StepOutputs now = {.drawn = drawn.data(), .counts = &counts_};
  StepOutputs ahead = {.drawn = drawn_ahead.data(), .counts = &counts_ahead_};
  const bool runs_ahead = group_->RunsAhead();
  uint64_t mark = group_->Launch(batch, now);
  for (int step = 1; step < steps; ++step) {
    if (!runs_ahead) group_->Await(mark, batch, now);
    for (int32_t& position : batch.positions) ++position;
    for (size_t r = 0; r < batch.tokens.size(); ++r) batch.tokens[r] = DrawnId(static_cast<int32_t>(r));
    const uint64_t next = group_->Launch(batch, ahead);
    if (runs_ahead) group_->Await(mark, batch, now);
    mark = next;
    std::swap(now, ahead);
  }
  group_->Await(mark, batch, now);
}

}  // namespace dejavu
