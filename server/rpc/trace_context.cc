#include "server/rpc/trace_context.h"

#include <random>

namespace dejavu {
namespace {

// "00-", 32 digits, "-", 16 digits, "-", 2 digits.
constexpr size_t kTraceparentBytes = 55;

bool IsHex(absl::string_view text) { return text.find_first_not_of("0123456789abcdef") == text.npos; }
bool IsZero(absl::string_view text) { return text.find_first_not_of('0') == text.npos; }

std::mt19937_64& Random() {
  thread_local std::mt19937_64 random{(uint64_t{std::random_device{}()} << 32) | std::random_device{}()};
  return random;
}

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

std::string RandomHex(int digits) {
  std::string text(static_cast<size_t>(digits), '0');
  while (IsZero(text)) {
    uint64_t bits = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      if (i % 16 == 0) bits = Random()();
      text[i] = "0123456789abcdef"[bits & 15];
      bits >>= 4;
    }
  }
  return text;
}

TraceContext ContextFor(std::optional<absl::string_view> traceparent, double sample_ratio) {
  if (traceparent.has_value()) {
    if (std::optional<TraceContext> context = ParseTraceparent(*traceparent)) return *std::move(context);
  }
  if (sample_ratio <= 0.0 || std::uniform_real_distribution<double>()(Random()) >= sample_ratio) return {};
  return {RandomHex(32), "", true};
}

}  // namespace dejavu
