#include "engine/serving/warm_up.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/base/clock.h"

namespace dejavu {
namespace {

// How long the step took, in ms.
double Step(ModelGroup& group, const ModelShape& shape, int32_t decode_rows, int32_t prefill_rows, Batch& batch,
            float* logits, Tier tier = Tier::kExact, bool drafts = false) {
  batch.Clear();
  batch.drafts = drafts;
  SparsityParams sparsity;
  sparsity.tier = tier;
  const int32_t token = shape.bos_token.value_or(0);
  for (int32_t i = 0; i < decode_rows; ++i) batch.AddDecodeRow(0, i, token, /*wants_logits=*/true, sparsity);
  for (int32_t i = 0; i < prefill_rows; ++i) {
    const bool last = i + 1 == prefill_rows;
    batch.AddRow(0, (decode_rows == 0 ? i : i + 1) % shape.context, token, last);
  }
  const SteadyTime start = std::chrono::steady_clock::now();
  group.Forward(batch, {logits});
  const double ms = MillisecondsSince(start);
  batch.Clear();
  return ms;
}

}  // namespace

void WarmUp(ModelGroup& group, const ModelShape& shape, const SchedulerOptions& options, std::optional<Tier> draft,
            Batch& batch, float* logits, Scheduler& scheduler) {
  std::iota(batch.block_table.begin(), batch.block_table.begin() + batch.blocks_per_slot, 0);
  const int32_t rows = std::min(options.max_batch, shape.context);
  const int32_t chunk = std::min({options.prefill_chunk_tokens, shape.context - 1, batch.max_rows - 1});
  // Where prompts are cheap the largest step at once: its scratch is taken now, or never.
  Step(group, shape, 0, group.RunsAhead() ? batch.max_rows : std::max(rows, chunk), batch, logits);
  struct Kind {
    StepShape step;
    double best_ms = std::numeric_limits<double>::infinity();
  };
  // Rows that decode are those of one sequence here, so that drafts of it are checked as they are.
  const int32_t checked = std::min(SpeculationParams().most_tokens, rows - 1);
  std::vector<Kind> kinds = {{{Tier::kExact, 1, 0}}, {{Tier::kExact, rows, 0}}, {{Tier::kExact, 1, chunk}}};
  if (checked > 0) kinds.push_back({{Tier::kExact, 1, 0, 0, checked}});
  if (draft.has_value()) kinds.push_back({{*draft, 1, 0, 0, 0, true}});
  constexpr int kTimes = 3;
  for (int i = 0; i < kTimes; ++i) {
    for (Kind& kind : kinds) {
      const StepShape& s = kind.step;
      kind.best_ms = std::min(kind.best_ms, Step(group, shape, s.decode_rows + s.check_rows, s.prefill_rows, batch,
                                                 logits, s.tier, s.drafts));
    }
  }
  // The quickest of the three counts thrice: the others may have been held up.
  for (int i = 0; i < kTimes; ++i) {
    for (Kind& kind : kinds) {
      kind.step.context_tokens = int64_t{kind.step.decode_rows} * (kind.step.decode_rows - 1) / 2;
      scheduler.Learn(kind.step, kind.best_ms);
    }
  }
}

double MeasureBandwidth(ModelGroup& group) {
  constexpr int64_t kMostBytes = int64_t{1} << 30;
  constexpr int kPasses = 3;
  Backend& device = group.backend();
  const Tensor all = group.loaded().weights.memory(), memory = all.Cols(0, std::min(all.cols, kMostBytes));
  double best_ms = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kPasses; ++i) {
    device.Stamp(0);
    device.ReadAll(memory);
    device.Stamp(1);
    best_ms = std::min(best_ms, device.ElapsedMs(0, 1));
  }
  return static_cast<double>(memory.bytes()) * group.ranks() / (best_ms / 1e3);
}

}  // namespace dejavu
