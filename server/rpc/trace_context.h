// W3C trace context (https://www.w3.org/TR/trace-context/): what a call's metadata says of the trace that it belongs
// to, and which calls without any are traced all the same. Any thread.
#ifndef SERVER_RPC_TRACE_CONTEXT_H_
#define SERVER_RPC_TRACE_CONTEXT_H_

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace dejavu {

struct TraceContext {
  std::string trace_id;        // 32 lower-case hexadecimal digits; empty: the call belongs to no trace
  std::string parent_span_id;  // 16; empty: the trace begins here
  bool sampled = false;        // spans of it are exported
};

// The value of `traceparent`; nothing where it is malformed. Later versions are read as far as version 00 goes.
std::optional<TraceContext> ParseTraceparent(absl::string_view value);

// What the client says; where it says nothing, a trace of its own for the share `sample_ratio` of the calls.
TraceContext ContextFor(std::optional<absl::string_view> traceparent, double sample_ratio);

}  // namespace dejavu

#endif  // SERVER_RPC_TRACE_CONTEXT_H_
