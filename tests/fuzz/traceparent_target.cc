// `traceparent` against the grammar of W3C trace context, read byte by byte.
#include <optional>
#include <string>

#include "server/rpc/trace_context.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

// version "-" trace-id "-" parent-id "-" flags ["-" anything], where 00 ends there and ff is nobody's.
bool IsTraceparent(absl::string_view value) {
  constexpr absl::string_view kForm = "hh-hhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhh-hhhhhhhhhhhhhhhh-hh";
  if (value.size() < kForm.size()) return false;
  for (size_t i = 0; i < kForm.size(); ++i) {
    const bool hex = (value[i] >= '0' && value[i] <= '9') || (value[i] >= 'a' && value[i] <= 'f');
    if (kForm[i] == 'h' ? !hex : value[i] != '-') return false;
  }
  const absl::string_view more = value.substr(kForm.size());
  if (!more.empty() && (value.substr(0, 2) == "00" || more[0] != '-')) return false;
  return value.substr(0, 2) != "ff" && value.substr(3, 32) != std::string(32, '0') &&
         value.substr(36, 16) != std::string(16, '0');
}

void Run(absl::string_view value) {
  const std::optional<TraceContext> read = ParseTraceparent(value);
  CHECK(read.has_value() == IsTraceparent(value)) << "read: " << read.has_value();
  const TraceContext context = ContextFor(value, /*sample_ratio=*/0.0);
  if (read.has_value()) {
    CHECK(read->trace_id == value.substr(3, 32) && read->parent_span_id == value.substr(36, 16)) << read->trace_id;
    const bool sampled = absl::string_view("13579bdf").find(value[54]) != absl::string_view::npos;
    CHECK(read->sampled == sampled) << "flags " << value.substr(53, 2);
    CHECK(context.trace_id == read->trace_id) << context.trace_id;
  } else {
    CHECK(context.trace_id.empty() && !context.sampled) << context.trace_id;
    const TraceContext own = ContextFor(value, /*sample_ratio=*/1.0);
    CHECK(own.trace_id.size() == 32 && own.parent_span_id.empty() && own.sampled) << own.trace_id;
  }
}

}  // namespace

FuzzTarget TraceparentTarget() {
  return {"traceparent",
          128,
          Run,
          {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
           "00-00000000000000000000000000000000-b7ad6b7169203331-00",
           "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0a-what-the-future-will-be-like",
           "ff-0af7651916cd43dd8448eb211c80319c-0000000000000000-01"},
          {"00-", "ff-", "-01", "0000000000000000", "-"}};
}

}  // namespace dejavu
