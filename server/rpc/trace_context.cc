#include "server/rpc/trace_context.h"

#include "server/rpc/random.h"

namespace dejavu {
namespace {

// "00-", 32 digits, "-", 16 digits, "-", 2 digits.
constexpr size_t kTraceparentBytes = 55;

bool IsHex(absl::string_view text) { return text.find_first_not_of("0123456789abcdef") == text.npos; }
bool IsZero(absl::string_view text) { return text.find_first_not_of('0') == text.npos; }

}  // namespace

std::optional<TraceContext> ParseTraceparent(absl::string_view value) {
  if (value.size() < kTraceparentBytes) return std::nullopt;
  const absl::string_view version = value.substr(0, 2), trace_id = value.substr(3, 32), span_id = value.substr(36, 16),
                          flags = value.substr(53, 2);
  if (value[2] != '-' || value[35] != '-' || value[52] != '-') return std::nullopt;
  if (!IsHex(version) || !IsHex(trace_id) || !IsHex(span_id) || !IsHex(flags)) return std::nullopt;
  if (version == "ff" || IsZero(trace_id) || IsZero(span_id)) return std::nullopt;
  if (value.size() > kTraceparentBytes && (version == "00" || value[kTraceparentBytes] != '-')) return std::nullopt;
  const bool sampled = ((flags[1] <= '9' ? flags[1] - '0' : flags[1] - 'a' + 10) & 1) != 0;
  return TraceContext{std::string(trace_id), std::string(span_id), sampled};
}

TraceContext ContextFor(std::optional<absl::string_view> traceparent, double sample_ratio) {
  if (traceparent.has_value()) {
    if (std::optional<TraceContext> context = ParseTraceparent(*traceparent)) return *std::move(context);
  }
  if (sample_ratio <= 0.0 || RandomShare() >= sample_ratio) return {};
  return {RandomHex(32), "", true};
}

}  // namespace dejavu
