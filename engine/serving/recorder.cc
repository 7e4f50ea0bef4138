#include "engine/serving/recorder.h"

#include <algorithm>

#include "spdlog/spdlog.h"

namespace dejavu {

Recorder::Recorder(const MetricsOptions& options) : options_(options), metrics_(*MetricEdgesFrom(options.edges)) {
  metrics_.counting = options.count;
}

void Recorder::FillStats(EngineStats* stats) const {
  stats->running = totals_.running.value();
  stats->kv_blocks_total = totals_.blocks.value();
  stats->kv_blocks_free = totals_.free_blocks.value();
  stats->kv_blocks_cached = totals_.cached_blocks.value();
  stats->steps = totals_.steps.value();
  stats->prompt_tokens = totals_.prompt_tokens.value();
  stats->generated_tokens = totals_.generated_tokens.value();
  stats->cached_prompt_tokens = totals_.cached_prompt_tokens.value();
  stats->preemptions = totals_.preemptions.value();
  stats->cost_steps = totals_.cost_steps.value();
  stats->speculation = speculation_.Load();
  stats->all_reduces = totals_.all_reduces.value();
  stats->all_reduce_ns = totals_.all_reduce_ns.value();
  if (const int64_t oldest = totals_.oldest_arrival.value(); oldest != 0) {
    stats->oldest_wait_s = SecondsSince(SteadyTime(SteadyTime::duration(oldest)));
  }
}

void Recorder::NoteStep(const StepTimes& t, const StepFacts& facts) {
  const SteadyTime end = std::chrono::steady_clock::now();
  TraceStep(t, facts, end);
  if (!metrics_.counting.load(std::memory_order_relaxed)) return;
  const StepShape& shape = facts.shape;
  const StepPhase phase = shape.prefill_rows == 0 ? kDecodeStep : shape.decode_rows == 0 ? kPrefillStep : kMixedStep;
  metrics_.step_duration[phase].Observe(Seconds(t.start, end));
  metrics_.step_component[kPlanPart].Observe(Seconds(t.start, t.planned));
  if (facts.shadow_rows > 0) metrics_.step_component[kShadowPart].Observe(Seconds(t.planned, t.shadowed));
  metrics_.step_component[kForwardPart].Observe(Seconds(t.shadowed, t.done));
  metrics_.step_component[kHandOutPart].Observe(Seconds(t.done, end));
  if (shape.decode_rows > 0) metrics_.batch_size.Observe(shape.decode_rows);
  metrics_.step_tokens.Observe(facts.rows);
  if (phase != kDecodeStep || facts.shadow_rows > 0) return;
  constexpr double kNew = 0.1;
  const double now = static_cast<double>(facts.weight_bytes) / Seconds(t.since, t.done);
  const double before = metrics_.bandwidth.value();
  metrics_.bandwidth.Set(before == 0.0 ? now : before + kNew * (now - before));
}

void Recorder::TraceStep(const StepTimes& t, const StepFacts& facts, SteadyTime end) {
  const auto ms = [](SteadyTime from, SteadyTime to) { return static_cast<float>(Milliseconds(from, to)); };
  StepRecord record;
  record.step = facts.step;
  record.start = t.start;
  record.total_ms = ms(t.start, end);
  record.plan_ms = ms(t.start, t.planned);
  record.shadow_ms = facts.shadow_rows > 0 ? ms(t.planned, t.shadowed) : 0.0f;
  record.forward_ms = ms(t.shadowed, t.done);
  record.handout_ms = ms(t.done, end);
  record.decode_rows = facts.shape.decode_rows;
  record.prefill_rows = facts.shape.prefill_rows;
  record.shadow_rows = facts.shadow_rows;
  record.weight_bytes = facts.weight_bytes;
  trace_.NoteStep(record);
}

void Recorder::NoteToken(const Sequence& s, SteadyTime now, int64_t step, bool first) {
  totals_.generated_tokens.Add(1);
  if (!first) return;
  const int32_t before = s.generated_tokens();
  if (metrics_.counting.load(std::memory_order_relaxed)) {
    const size_t series = EngineMetrics::SeriesOf(s.request.sparsity.tier, s.request.urgency);
    before == 0 ? metrics_.time_to_first_token[series].Observe(Seconds(s.finish.queued, now))
                : metrics_.inter_token[series].Observe(Seconds(s.last_token, now));
  }
  if (before > 0) {
    trace_.NoteToken(s.id, now, s.last_token, static_cast<int32_t>(step - s.last_token_step), before);
  }
}

void Recorder::NoteSaturated(int64_t count) {
  if (count == 0) return;
  metrics_.kv_saturated_values.Add(count);
  if (std::exchange(warned_of_saturation_, true)) return;
  spdlog::warn(
      "{} keys or values of a step were beyond the range of kv.dtype fp16 (65504) and were stored as its largest "
      "number: texts may differ from the model's, which kv.dtype fp32 prevents; said once, "
      "dejavu_kv_saturated_values_total counts on",
      count);
}

void Recorder::NoteEnd(const Sequence& s, bool waiting) {
  const Finish& f = s.finish;
  const int32_t tokens = f.generated_tokens;
  const RequestStage stage = waiting && tokens == 0 ? kQueuedStage : tokens == 0 ? kPrefillStage : kDecodeStage;
  if (f.reason == FinishReason::kCancelled) metrics_.cancelled[stage].Add(1);
  if (f.reason == FinishReason::kDeadline) metrics_.deadline_exceeded[stage].Add(1);
  if (f.reason == FinishReason::kError || f.reason == FinishReason::kShutdown || stage == kQueuedStage) return;
  const size_t series = EngineMetrics::SeriesOf(s.request.sparsity.tier, s.request.urgency);
  metrics_.duration[series].Observe(Seconds(f.queued, f.finished));
  metrics_.queue[series].Observe(Seconds(f.queued, f.scheduled));
  if (tokens == 0) return;
  metrics_.prefill[series].Observe(Seconds(f.scheduled, f.first_token));
  metrics_.decode[series].Observe(Seconds(f.first_token, f.finished));
  const double per_token_s = tokens > 1 ? Seconds(f.first_token, s.last_token) / (tokens - 1) : 0.0;
  if (tokens > 1) metrics_.time_per_output_token[series].Observe(per_token_s);
  if (f.sparsity.decode_tokens > 0) {
    metrics_.request_mlp_density.Observe(f.sparsity.mlp_density);
    metrics_.request_head_density.Observe(f.sparsity.head_density);
  }
  const auto note_slo = [&](Slo slo, double target_ms, double seconds) {
    if (target_ms > 0.0) (seconds * 1e3 <= target_ms ? metrics_.slo_attained : metrics_.slo_missed)[slo].Add(1);
  };
  note_slo(kTtftSlo, options_.slo_ttft_ms, Seconds(f.queued, f.first_token));
  if (tokens > 1) note_slo(kItlSlo, options_.slo_itl_ms, per_token_s);
}

void Recorder::NoteState(const Scheduler& scheduler, const BlockPool& pool, const CommunicatorStats& communication) {
  totals_.running.Set(static_cast<int32_t>(scheduler.running().size()));
  totals_.blocks.Set(pool.total());
  totals_.free_blocks.Set(pool.free());
  totals_.cached_blocks.Set(pool.cached());
  const auto& waiting = scheduler.waiting();
  const auto oldest = std::min_element(waiting.begin(), waiting.end(),
                                       [](const auto& a, const auto& b) { return a->arrival < b->arrival; });
  totals_.oldest_arrival.Set(oldest == waiting.end() ? 0 : (*oldest)->arrival.time_since_epoch().count());
  totals_.all_reduces.Set(communication.all_reduces);
  totals_.all_reduce_ns.Set(communication.all_reduce_ns);
}

}  // namespace dejavu
