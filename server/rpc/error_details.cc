#include "server/rpc/error_details.h"

#include <algorithm>

#include "absl/strings/cord.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dejavu/rpc/status.pb.h"

namespace dejavu {
namespace {

constexpr size_t kMaxMessageBytes = 1024;  // percent-encoding may triple it on the wire
constexpr size_t kMaxDetailBytes = 2048;

std::string TypeUrl(absl::string_view message) { return absl::StrCat("type.googleapis.com/google.rpc.", message); }

// At most `max_bytes`, not cut inside a UTF-8 sequence.
std::string Truncated(absl::string_view text, size_t max_bytes) {
  if (text.size() <= max_bytes) return std::string(text);
  size_t end = max_bytes - 3;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return absl::StrCat(text.substr(0, end), "...");
}

// The type URLs are Google's, the messages our wire-compatible copies.
void Attach(absl::string_view type, const google::protobuf::MessageLite& detail, absl::Status* status) {
  status->SetPayload(TypeUrl(type), absl::Cord(detail.SerializeAsString()));
}

void AttachRetry(std::chrono::milliseconds delay, absl::Status* status) {
  rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(delay.count() / 1000);
  retry.mutable_retry_delay()->set_nanos(static_cast<int>(delay.count() % 1000) * 1'000'000);
  Attach("RetryInfo", retry, status);
}

}  // namespace

absl::Status InvalidField(absl::string_view field, absl::string_view problem) {
  absl::Status status = absl::InvalidArgumentError(absl::StrCat(field, " ", problem));
  rpc::BadRequest bad_request;
  auto* violation = bad_request.add_field_violations();
  violation->set_field(Truncated(field, 128));
  violation->set_description(Truncated(problem, 512));
  Attach("BadRequest", bad_request, &status);
  return status;
}

absl::Status WithErrorInfo(absl::Status status, absl::string_view reason,
                           const std::vector<std::pair<std::string, std::string>>& metadata) {
  rpc::ErrorInfo info;
  info.set_reason(std::string(reason));
  info.set_domain(kErrorDomain);
  for (const auto& [key, value] : metadata) (*info.mutable_metadata())[key] = Truncated(value, 256);
  Attach("ErrorInfo", info, &status);
  return status;
}

absl::Status UnavailableRetry(absl::string_view message, std::chrono::milliseconds delay) {
  absl::Status status = absl::UnavailableError(message);
  AttachRetry(delay, &status);
  return status;
}

absl::Status QuotaExceeded(absl::string_view subject, absl::string_view message, std::chrono::milliseconds delay) {
  absl::Status status = absl::ResourceExhaustedError(message);
  rpc::QuotaFailure failure;
  auto* violation = failure.add_violations();
  violation->set_subject(std::string(subject));
  violation->set_description(Truncated(message, 512));
  Attach("QuotaFailure", failure, &status);
  AttachRetry(delay, &status);
  return status;
}

absl::Status RefusedWithRetry(absl::StatusCode code, absl::string_view message, absl::string_view reason,
                              std::chrono::milliseconds delay) {
  absl::Status status = code == absl::StatusCode::kResourceExhausted ? QuotaExceeded("engine", message, delay)
                                                                     : absl::Status(code, message);
  AttachRetry(delay, &status);
  return WithErrorInfo(std::move(status), reason);
}

std::optional<std::chrono::milliseconds> RetryDelay(const absl::Status& status) {
  const absl::optional<absl::Cord> detail = status.GetPayload(TypeUrl("RetryInfo"));
  rpc::RetryInfo retry;
  if (!detail.has_value() || !retry.ParseFromString(std::string(*detail))) return std::nullopt;
  return std::chrono::milliseconds(retry.retry_delay().seconds() * 1000 + retry.retry_delay().nanos() / 1'000'000);
}

absl::Status MissingFeature(absl::string_view subject, absl::string_view message) {
  absl::Status status = absl::FailedPreconditionError(message);
  rpc::PreconditionFailure failure;
  auto* violation = failure.add_violations();
  violation->set_type("FEATURE");
  violation->set_subject(std::string(subject));
  violation->set_description(Truncated(message, 512));
  Attach("PreconditionFailure", failure, &status);
  return status;
}

std::string Printable(absl::string_view text, size_t max_bytes) {
  const bool cut = text.size() > max_bytes;
  return absl::StrCat("\"", absl::CHexEscape(text.substr(0, max_bytes)), cut ? "\"..." : "\"");
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  rpc::Status packed;
  packed.set_code(static_cast<int>(status.code()));
  packed.set_message(Truncated(status.message(), kMaxMessageBytes));
  size_t detail_bytes = 0;
  status.ForEachPayload([&](absl::string_view type_url, const absl::Cord& payload) {
    detail_bytes += type_url.size() + payload.size() + 8;  // 8: tags and lengths
    if (detail_bytes > kMaxDetailBytes) return;
    auto* detail = packed.add_details();
    detail->set_type_url(std::string(type_url));
    detail->set_value(std::string(payload));
  });
  // Debian's absl::Status and gRPC number the codes alike, as google.rpc.Code does.
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), packed.message(),
                      packed.details_size() == 0 ? std::string() : packed.SerializeAsString());
}

}  // namespace dejavu
