// Turns the record of a call into spans for OpenTelemetry: one for the call and, if the engine worked, its children
// `queue`, `prefill` and `decode`. Any thread.
#ifndef SERVER_OBSERVE_SPANS_H_
#define SERVER_OBSERVE_SPANS_H_

#include <chrono>
#include <string>

#include "kernels/base/clock.h"
#include "opentelemetry/trace_service.pb.h"
#include "server/rpc/request_record.h"

namespace dejavu {

// A moment on both clocks, by which steady times become times of day.
struct TraceClock {
  SteadyTime now = std::chrono::steady_clock::now();
  std::chrono::system_clock::time_point now_unix = std::chrono::system_clock::now();
};

int SpanCount(const RequestRecord& record);
// Adds SpanCount(record) spans.
void AppendSpans(const RequestRecord& record, const std::string& model, const TraceClock& clock,
                 opentelemetry::proto::collector::trace::v1::ScopeSpans* spans);

}  // namespace dejavu

#endif  // SERVER_OBSERVE_SPANS_H_
