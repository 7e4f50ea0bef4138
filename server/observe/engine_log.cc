#include "server/observe/engine_log.h"

#include "kernels/base/clock.h"
#include "server/observe/logging.h"

namespace dejavu {

EngineLog::EngineLog(const Engine* engine, std::chrono::duration<double> every)
    : engine_(engine), every_(every), thread_([this] { Run(); }) {}

EngineLog::~EngineLog() {
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    stop_.NotifyAll();
  }
  thread_.join();
}

EngineLog::Snapshot EngineLog::Take() const {
  Snapshot snapshot{std::chrono::steady_clock::now(), engine_->stats()};
  const SparsityStats sparsity = engine_->sparsity_stats();
  for (const LayerSparsityStats& layer : sparsity.layers) {
    snapshot.predicted_rows += layer.rows;
    snapshot.predicted_neurons += layer.selected + layer.active;
  }
  return snapshot;
}

void EngineLog::Run() {
  Snapshot before = Take();
  while (true) {
    const SteadyTime next = before.at + std::chrono::duration_cast<SteadyTime::duration>(every_);
    {
      MutexLock lock(mutex_);
      while (!stopping_ && stop_.WaitUntil(mutex_, next)) {
      }
      if (stopping_) return;
    }
    const Snapshot now = Take();
    const bool idle = now.stats.steps == before.stats.steps && now.stats.running == 0 && now.stats.waiting == 0;
    if (!idle) Write(before, now);
    before = now;
  }
}

void EngineLog::Write(const Snapshot& before, const Snapshot& now) const {
  if (!LogsEvents(spdlog::level::info)) return;
  const double seconds = Seconds(before.at, now.at);
  const auto grown = [&](int64_t EngineStats::*counter) {
    return static_cast<double>(now.stats.*counter - before.stats.*counter);
  };
  LogFields fields(ActiveLogFormat());
  fields.Count("running", now.stats.running).Count("waiting", now.stats.waiting);
  fields.Number("steps_per_s", grown(&EngineStats::steps) / seconds, 1);
  fields.Number("prompt_tokens_per_s", grown(&EngineStats::prompt_tokens) / seconds, 1);
  fields.Number("generated_tokens_per_s", grown(&EngineStats::generated_tokens) / seconds, 1);
  if (now.stats.kv_blocks_total > 0) {
    const double used = now.stats.kv_blocks_total - now.stats.kv_blocks_free;
    fields.Number("kv_use", used / now.stats.kv_blocks_total, 3);
  }
  // Tokens of prompts: computed ones and those whose blocks were there.
  const double cached = grown(&EngineStats::cached_prompt_tokens);
  const double prompts = cached + grown(&EngineStats::prompt_tokens);
  if (prompts > 0.0) fields.Number("prefix_hits", cached / prompts, 3);
  const auto rows = static_cast<double>(now.predicted_rows - before.predicted_rows);
  if (rows > 0.0) {
    const auto neurons = static_cast<double>(now.predicted_neurons - before.predicted_neurons);
    fields.Number("density", neurons / (2.0 * rows * engine_->model().ffn), 4);
  }
  LogEvent(spdlog::level::info, "engine", fields);
}

}  // namespace dejavu
