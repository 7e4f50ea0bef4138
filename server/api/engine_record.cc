#include "server/api/engine_record.h"

#include <algorithm>
#include <utility>

namespace dejavu {
namespace {

// Adds what became of a sample.
void AddSample(const EngineOutcome& outcome, RequestRecord* record) {
  const Finish& finish = outcome.finish;
  const bool first = !record->engine();
  record->prompt_tokens += finish.prompt_tokens;
  record->generated_tokens += finish.generated_tokens;
  record->cached_tokens += finish.cached_prompt_tokens;
  record->queued = first ? finish.queued : std::min(record->queued, finish.queued);
  record->scheduled = first ? finish.scheduled : std::min(record->scheduled, finish.scheduled);
  record->first_token = first ? finish.first_token : std::min(record->first_token, finish.first_token);
  if (first || finish.finished >= record->finished) {
    record->finished = finish.finished;
    record->finish_reason = std::string(outcome.reason);
  }
}

}  // namespace

bool EngineRecord::Finished() {
  return std::all_of(sinks.begin(), sinks.end(), [](const auto& sink) { return sink->outcome().has_value(); });
}

// Each prompt counts once, however many samples it has, and if any of them ever ran.
bool EngineRecord::Settle() {
  if (!Finished()) return false;
  if (lease == nullptr || sinks.empty()) return true;
  const size_t samples = sinks.size() / static_cast<size_t>(asked.prompts);
  int64_t prompts = 0, prompt = 0, generated = 0;
  for (size_t i = 0; i < sinks.size(); ++i) {
    const Finish finish = sinks[i]->outcome()->finish;
    if (finish.scheduled < finish.finished) prompt = finish.prompt_tokens;
    generated += finish.generated_tokens;
    if ((i + 1) % samples == 0) prompts += std::exchange(prompt, 0);
  }
  lease->Settle(prompts + generated);
  return true;
}

bool EngineRecord::Fill(RequestRecord* record) {
  if (!Settle()) return false;
  static_cast<RequestAsked&>(*record) = asked;
  double density_sum = 0.0;
  int64_t decode_tokens = 0;
  for (const auto& sink : sinks) {
    const EngineOutcome outcome = *sink->outcome();
    AddSample(outcome, record);
    const SparsityReport& sparsity = outcome.finish.sparsity;
    density_sum += sparsity.mlp_density * static_cast<double>(sparsity.decode_tokens);
    decode_tokens += sparsity.decode_tokens;
  }
  if (decode_tokens > 0) record->density = density_sum / static_cast<double>(decode_tokens);
  // The engine was told no more than to cancel; the call's own end says why.
  if (record->finish_reason == "cancelled") {
    if (record->code == grpc::StatusCode::DEADLINE_EXCEEDED) record->finish_reason = "deadline";
    if (stopped) record->finish_reason = "shutdown";
  }
  return true;
}

}  // namespace dejavu
