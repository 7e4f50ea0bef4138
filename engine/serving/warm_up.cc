#include "engine/serving/warm_up.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>

#include "kernels/base/clock.h"

namespace dejavu {
namespace {

// How long the step took, in ms.
double Step(ModelGroup& group, const ModelShape& shape, int32_t decode_rows, int32_t prefill_rows, Batch& batch,
            float* logits) {
  batch.Clear();
  SparsityParams exact;
  exact.tier = Tier::kExact;
  const int32_t token = shape.bos_token.value_or(0);
  for (int32_t i = 0; i < decode_rows; ++i) batch.AddDecodeRow(0, i, token, /*wants_logits=*/true, exact);
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

void WarmUp(ModelGroup& group, const ModelShape& shape, const SchedulerOptions& options, Batch& batch, float* logits,
            Scheduler& scheduler) {
  std::iota(batch.block_table.begin(), batch.block_table.begin() + batch.blocks_per_slot, 0);
  const int32_t rows = std::min(options.max_batch, shape.context);
  const int32_t chunk = std::min({options.prefill_chunk_tokens, shape.context - 1, batch.max_rows - 1});
  // Where prompts are cheap the largest step at once: its scratch is taken now, or never.
  Step(group, shape, 0, group.RunsAhead() ? batch.max_rows : std::max(rows, chunk), batch, logits);
  struct Kind {
    int32_t decode_rows, prefill_rows;
    double best_ms = std::numeric_limits<double>::infinity();
  };
  Kind kinds[] = {{1, 0}, {rows, 0}, {1, chunk}};
  constexpr int kTimes = 3;
  for (int i = 0; i < kTimes; ++i) {
    for (Kind& kind : kinds) {
      kind.best_ms = std::min(kind.best_ms, Step(group, shape, kind.decode_rows, kind.prefill_rows, batch, logits));
    }
  }
  // The quickest of the three counts thrice: the others may have been held up.
  for (int i = 0; i < kTimes; ++i) {
    for (const Kind& kind : kinds) {
      const int64_t context = int64_t{kind.decode_rows} * (kind.decode_rows - 1) / 2;
      scheduler.Learn({Tier::kExact, kind.decode_rows, kind.prefill_rows, context}, kind.best_ms);
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
