#include "server/observe/spans.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/utf8.h"
#include "server/rpc/random.h"

namespace dejavu {

namespace otlp = opentelemetry::proto::collector::trace::v1;

namespace {

// A protobuf string must be valid UTF-8, and what clients send need not be.
std::string ValidUtf8(absl::string_view text) {
  text = text.substr(0, kMaxRecordedBytes);
  return IsValidUtf8(text) ? std::string(text) : absl::CHexEscape(text);
}

void Add(absl::string_view key, absl::string_view value, otlp::Span* span) {
  otlp::KeyValue* attribute = span->add_attributes();
  attribute->set_key(std::string(key));
  attribute->mutable_value()->set_string_value(ValidUtf8(value));
}
void AddCount(absl::string_view key, int64_t value, otlp::Span* span) {
  otlp::KeyValue* attribute = span->add_attributes();
  attribute->set_key(std::string(key));
  attribute->mutable_value()->set_int_value(value);
}
void AddNumber(absl::string_view key, double value, otlp::Span* span) {
  otlp::KeyValue* attribute = span->add_attributes();
  attribute->set_key(std::string(key));
  attribute->mutable_value()->set_double_value(value);
}

// Nothing for the calls that make no tokens.
absl::string_view Operation(const RequestRecord& record) {
  for (const absl::string_view method : {"Generate", "GenerateStream", "ModelInfer", "ModelStreamInfer"}) {
    if (record.method == method) return "text_completion";
  }
  return record.method == "Score" ? "score" : "";
}

class SpanMaker {
 public:
  SpanMaker(const RequestRecord& record, const TraceClock& clock, otlp::ScopeSpans* spans)
      : trace_id_(absl::HexStringToBytes(record.trace.trace_id)), clock_(clock), spans_(spans) {}

  otlp::Span* Make(std::string name, const std::string& parent, SteadyTime start, SteadyTime end) {
    otlp::Span* span = spans_->add_spans();
    span->set_trace_id(trace_id_);
    span->set_span_id(absl::HexStringToBytes(RandomHex(16)));
    span->set_parent_span_id(parent);
    span->set_name(std::move(name));
    span->set_start_time_unix_nano(UnixNanos(start));
    span->set_end_time_unix_nano(UnixNanos(std::max(start, end)));
    return span;
  }

 private:
  uint64_t UnixNanos(SteadyTime time) const {
    return static_cast<uint64_t>(
        std::chrono::nanoseconds(clock_.now_unix.time_since_epoch() - (clock_.now - time)).count());
  }

  const std::string trace_id_;
  const TraceClock& clock_;
  otlp::ScopeSpans* const spans_;
};

int64_t SamplesOfAPrompt(const RequestRecord& record) { return std::max(record.samples / record.prompts, 1); }

void DescribeRequest(const RequestRecord& record, const std::string& model, otlp::Span* span) {
  span->set_kind(otlp::Span::SPAN_KIND_SERVER);
  Add("rpc.system", "grpc", span);
  if (!record.service.empty()) Add("rpc.service", record.service, span);
  Add("rpc.method", record.method, span);
  AddCount("rpc.grpc.status_code", static_cast<int64_t>(record.code), span);
  if (record.code != grpc::StatusCode::OK) {
    Add("error.type", CodeName(record.code), span);
    span->mutable_status()->set_code(otlp::Status::STATUS_CODE_ERROR);
    span->mutable_status()->set_message(std::string(CodeName(record.code)));
  }
  if (!record.tenant.empty()) Add("dejavu.tenant", record.tenant, span);
  const absl::string_view operation = Operation(record);
  if (operation.empty()) return;
  Add("gen_ai.operation.name", operation, span);
  Add("gen_ai.provider.name", "dejavud", span);
  Add("gen_ai.request.model", model, span);
  if (!record.request_id.empty()) Add("gen_ai.response.id", record.request_id, span);
  if (record.tier.has_value()) Add("dejavu.tier", Name(*record.tier), span);
  if (record.urgency.has_value()) Add("dejavu.priority", Name(*record.urgency), span);
  if (!record.engine()) return;
  if (SamplesOfAPrompt(record) > 1) AddCount("gen_ai.request.choice.count", SamplesOfAPrompt(record), span);
  otlp::KeyValue* reasons = span->add_attributes();
  reasons->set_key("gen_ai.response.finish_reasons");
  reasons->mutable_value()->mutable_array_value()->add_values()->set_string_value(record.finish_reason);
  AddCount("gen_ai.usage.input_tokens", record.prompt_tokens / SamplesOfAPrompt(record), span);
  AddCount("gen_ai.usage.output_tokens", record.generated_tokens, span);
  AddCount("dejavu.cached_tokens", record.cached_tokens, span);
  AddNumber("gen_ai.latency.time_in_queue", Seconds(record.arrival, record.scheduled), span);
  if (record.generated_tokens > 0) {
    AddNumber("gen_ai.latency.time_to_first_token", Seconds(record.arrival, record.first_token), span);
  }
  AddNumber("gen_ai.latency.time_in_model_prefill", Seconds(record.scheduled, record.first_token), span);
  AddNumber("gen_ai.latency.time_in_model_decode", Seconds(record.first_token, record.finished), span);
  AddNumber("gen_ai.latency.e2e", Seconds(record.arrival, record.ended), span);
  if (record.density.has_value()) AddNumber("dejavu.density", *record.density, span);
}

}  // namespace

int SpanCount(const RequestRecord& record) { return record.engine() ? 4 : 1; }

void AppendSpans(const RequestRecord& record, const std::string& model, const TraceClock& clock,
                 otlp::ScopeSpans* spans) {
  SpanMaker maker(record, clock, spans);
  const absl::string_view operation = Operation(record);
  otlp::Span* const request =
      maker.Make(operation.empty() ? record.method : absl::StrCat(operation, " ", model),
                 absl::HexStringToBytes(record.trace.parent_span_id), record.arrival, record.ended);
  DescribeRequest(record, model, request);
  if (!record.engine()) return;
  const std::string parent = request->span_id();
  maker.Make("queue", parent, record.queued, record.scheduled)->set_kind(otlp::Span::SPAN_KIND_INTERNAL);
  otlp::Span* const prefill = maker.Make("prefill", parent, record.scheduled, record.first_token);
  prefill->set_kind(otlp::Span::SPAN_KIND_INTERNAL);
  AddCount("gen_ai.usage.input_tokens", record.prompt_tokens / SamplesOfAPrompt(record), prefill);
  AddCount("dejavu.cached_tokens", record.cached_tokens, prefill);
  otlp::Span* const decode = maker.Make("decode", parent, record.first_token, record.finished);
  decode->set_kind(otlp::Span::SPAN_KIND_INTERNAL);
  AddCount("gen_ai.usage.output_tokens", record.generated_tokens, decode);
  if (record.tier.has_value()) Add("dejavu.tier", Name(*record.tier), decode);
  if (record.density.has_value()) AddNumber("dejavu.density", *record.density, decode);
}

}  // namespace dejavu
