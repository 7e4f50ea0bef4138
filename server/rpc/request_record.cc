#include "server/rpc/request_record.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/match.h"

namespace dejavu {

absl::string_view ApiOf(absl::string_view service) {
  constexpr std::array<std::pair<absl::string_view, absl::string_view>, 5> kApis = {
      {{"dejavu.", "dejavu"}, {"inference.", "kserve"}, {"vllm.", "vllm"}, {"xds.", "orca"}, {"grpc.", "grpc"}}};
  for (const auto& [prefix, name] : kApis) {
    if (absl::StartsWith(service, prefix)) return name;
  }
  return "none";
}

absl::string_view CodeName(grpc::StatusCode code) {
  constexpr std::array<absl::string_view, 17> kNames = {
      "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
      "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
      "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
      "DATA_LOSS", "UNAUTHENTICATED"};
  const auto index = static_cast<size_t>(code);
  return index < kNames.size() ? kNames[index] : "UNKNOWN";
}

std::optional<double> MeanInterTokenSeconds(const RequestRecord& record) {
  const int64_t gaps = record.generated_tokens / std::max(record.samples, 1) - 1;  // of one sample
  if (!record.engine() || gaps < 1) return std::nullopt;
  return std::chrono::duration<double>(record.finished - record.first_token).count() / static_cast<double>(gaps);
}

}  // namespace dejavu
