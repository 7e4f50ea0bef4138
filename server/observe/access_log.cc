#include "server/observe/access_log.h"

#include "absl/strings/match.h"
#include "kernels/base/clock.h"
#include "server/observe/logging.h"

namespace dejavu {
namespace {

double UnixSeconds(SteadyTime time) {
  const auto ago = std::chrono::steady_clock::now() - time;
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch() - ago).count();
}

void TextIfAny(absl::string_view key, absl::string_view value, LogFields* fields) {
  if (!value.empty()) fields->Text(key, value.substr(0, kMaxRecordedBytes));
}

}  // namespace

void AccessLog::OnRequestEnd(const RequestRecord& record) {
  const auto level = absl::StartsWith(record.service, "grpc.") ? spdlog::level::debug : spdlog::level::info;
  // Whoever is refused can come as often as he likes.
  const bool refused = record.code != grpc::StatusCode::OK && !record.engine();
  const bool logs = refused ? LogsRefusal(level, CodeName(record.code), refused_per_s_) : LogsEvents(level);
  if (!logs) return;
  LogFields fields(ActiveLogFormat());
  TextIfAny("request_id", record.request_id, &fields);
  TextIfAny("trace_id", record.trace.trace_id, &fields);
  TextIfAny("tenant", record.tenant, &fields);
  fields.Text("api", ApiOf(record.service))
      .Text("method", record.method)
      .Text("peer", record.peer)
      .Text("code", CodeName(record.code));
  fields.Text("finish_reason", record.finish_reason);
  if (record.tier.has_value()) fields.Text("tier", Name(*record.tier));
  if (record.urgency.has_value()) fields.Text("priority", Name(*record.urgency));
  if (record.prompts > 1) fields.Count("prompts", record.prompts);
  if (record.samples > record.prompts) fields.Count("samples", record.samples);
  if (record.engine()) {
    fields.Count("prompt_tokens", record.prompt_tokens).Count("generated_tokens", record.generated_tokens);
    fields.Count("cached_tokens", record.cached_tokens);
    fields.Number("queue_ms", Milliseconds(record.arrival, record.scheduled), 3);
    if (record.generated_tokens > 0) fields.Number("ttft_ms", Milliseconds(record.arrival, record.first_token), 3);
    if (const auto gap = MeanInterTokenSeconds(record)) fields.Number("mean_itl_ms", *gap * 1e3, 3);
    if (record.density.has_value()) fields.Number("density", *record.density, 4);
  }
  // With these a log can be replayed (dejavu-loadtest run --replay), including requests that were refused for lack of
  // room.
  if (record.max_new_tokens > 0 && record.seed.has_value()) {
    if (!record.engine()) fields.Count("prompt_tokens", record.asked_prompt_tokens * record.samples);
    fields.Count("max_new_tokens", record.max_new_tokens).Unsigned("seed", *record.seed);
    fields.Number("arrival_s", UnixSeconds(record.arrival), 6);
  }
  fields.Number("total_ms", Milliseconds(record.arrival, record.engine() ? record.finished : record.ended), 3);
  if (record.client_stall_seconds > 0.0) fields.Number("client_stall_ms", record.client_stall_seconds * 1e3, 3);
  if (!record.prompt_text.empty()) fields.Text("prompt", record.prompt_text);
  LogEvent(level, "request", fields);
}

}  // namespace dejavu
