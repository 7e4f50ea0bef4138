#include "server/rpc/error_details.h"

#include <optional>

#include "absl/strings/cord.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dejavu/rpc/status.pb.h"
#include "engine/refusal.h"

namespace dejavu {
namespace {

constexpr size_t kMaxMessageBytes = 1024;  // percent-encoding may triple it on the wire
constexpr size_t kMaxDetailBytes = 2048;
constexpr absl::string_view kTypeUrls = "type.googleapis.com/google.rpc.";

// At most `max_bytes`, not cut inside a UTF-8 sequence.
std::string Truncated(absl::string_view text, size_t max_bytes) {
  if (text.size() <= max_bytes) return std::string(text);
  size_t end = max_bytes - 3;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return absl::StrCat(text.substr(0, end), "...");
}

// The type URLs are Google's, the messages our wire-compatible copies.
void Attach(absl::string_view type, const google::protobuf::MessageLite& detail, absl::Status* status) {
  status->SetPayload(absl::StrCat(kTypeUrls, type), absl::Cord(detail.SerializeAsString()));
}

void AttachQuotaFailure(absl::string_view subject, absl::string_view description, absl::Status* status) {
  rpc::QuotaFailure failure;
  auto* violation = failure.add_violations();
  violation->set_subject(std::string(subject));
  violation->set_description(Truncated(description, 512));
  Attach("QuotaFailure", failure, status);
}

// `status` with details for what its refusal says.
absl::Status WithRefusalDetails(absl::Status status) {
  const std::optional<RefusalInfo> refusal = RefusalOf(status);
  if (!refusal.has_value() || refusal->retry_after.count() == 0) return status;
  rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(refusal->retry_after.count() / 1000);
  retry.mutable_retry_delay()->set_nanos(static_cast<int>(refusal->retry_after.count() % 1000) * 1'000'000);
  Attach("RetryInfo", retry, &status);
  if (!refusal->reason.has_value()) return status;
  if (absl::IsResourceExhausted(status)) AttachQuotaFailure("engine", status.message(), &status);
  return WithErrorInfo(std::move(status), Name(*refusal->reason));
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

absl::Status WithFieldNames(absl::Status status, absl::Span<const FieldName> names) {
  const absl::optional<absl::Cord> payload = status.GetPayload(absl::StrCat(kTypeUrls, "BadRequest"));
  rpc::BadRequest bad_request;
  if (!payload.has_value() || !bad_request.ParseFromString(std::string(*payload))) return status;
  for (const FieldName& name : names) {
    std::string* const field = bad_request.mutable_field_violations(0)->mutable_field();
    if (!absl::StartsWith(*field, name.ours)) continue;
    field->replace(0, name.ours.size(), name.theirs.data(), name.theirs.size());
    // Its message begins with the field.
    status = absl::InvalidArgumentError(absl::StrCat(name.theirs, status.message().substr(name.ours.size())));
    Attach("BadRequest", bad_request, &status);
    break;
  }
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
  return WithRefusal(absl::UnavailableError(message), {.retry_after = delay});
}

absl::Status ServerStopped() { return UnavailableRetry("the server has stopped", std::chrono::seconds(1)); }

absl::Status StoppedBeforeDone() {
  return UnavailableRetry("the server stopped before the request was done", std::chrono::seconds(1));
}

absl::Status QuotaExceeded(absl::string_view subject, absl::string_view message, std::chrono::milliseconds delay) {
  absl::Status status = WithRefusal(absl::ResourceExhaustedError(message), {.retry_after = delay});
  AttachQuotaFailure(subject, message, &status);
  return status;
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
  WithRefusalDetails(status).ForEachPayload([&](absl::string_view type_url, const absl::Cord& payload) {
    if (!absl::StartsWith(type_url, kTypeUrls)) return;    // ours alone
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
