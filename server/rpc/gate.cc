#include "server/rpc/gate.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

absl::Status Unauthenticated(absl::string_view reason, absl::string_view message) {
  return WithErrorInfo(absl::UnauthenticatedError(message), reason);
}

// What the call carries, or why it carries none that could be looked up.
absl::StatusOr<absl::string_view> BearerToken(const grpc::CallbackServerContext& context) {
  constexpr absl::string_view kScheme = "bearer ";
  const auto [begin, end] = context.client_metadata().equal_range("authorization");
  if (begin == end) {
    return Unauthenticated("TOKEN_MISSING",
                           "the call carries no token; send the metadata `authorization: Bearer TOKEN`");
  }
  const absl::string_view value(begin->second.data(), begin->second.size());
  const bool alone = std::next(begin) == end;
  if (!alone || !absl::StartsWithIgnoreCase(value, kScheme) || value.size() - kScheme.size() > Tokens::kMaxTokenBytes) {
    return Unauthenticated("TOKEN_MALFORMED",
                           absl::StrCat("the metadata `authorization` must be given once, as Bearer and a token of at "
                                        "most ",
                                        Tokens::kMaxTokenBytes, " bytes"));
  }
  return value.substr(kScheme.size());
}

}  // namespace

size_t MetadataBytes(const grpc::CallbackServerContext& context) {
  size_t bytes = 0;
  for (const auto& [key, value] : context.client_metadata()) bytes += key.size() + value.size() + 32;
  return bytes;
}

void Gate::Register(const std::string& service, const std::string& method, Needs needs) {
  const auto [entry, fresh] = methods_.emplace(absl::StrCat("/", service, "/", method), needs);
  CHECK(fresh || entry->second == needs) << entry->first << " is registered with different needs";
  Needs& strictest = strictest_.emplace(service, needs).first->second;
  strictest.caller = std::max(strictest.caller, needs.caller);
  strictest.resource = std::max(strictest.resource, needs.resource);
}

absl::Status Gate::Admit(absl::string_view path, const grpc::CallbackServerContext& context,
                         RequestRecord* record) const {
  if (const size_t bytes = MetadataBytes(context); bytes > max_metadata_bytes_) {
    return WithErrorInfo(
        absl::ResourceExhaustedError(absl::StrCat("the call has ", bytes, " bytes of metadata; at most ",
                                                  max_metadata_bytes_, " are taken (transport.max_metadata_bytes)")),
        "METADATA_TOO_LARGE");
  }
  const Needs needs = NeedsOf(path);
  if (tokens_ != nullptr && needs.caller != Caller::kAnybody) {
    RETURN_IF_ERROR(CheckToken(needs.caller, context, record));
  }
  return CheckPhase(lifecycle_->phase(), needs.resource);
}

// A method that its service does not have needs what the strictest of them needs.
Needs Gate::NeedsOf(absl::string_view path) const {
  const auto method = methods_.find(path);
  if (method != methods_.end()) return method->second;
  absl::string_view name = path;
  absl::ConsumePrefix(&name, "/");
  const auto service = strictest_.find(name.substr(0, name.find('/')));
  return service == strictest_.end() ? Needs() : service->second;
}

absl::Status Gate::CheckToken(Caller caller, const grpc::CallbackServerContext& context, RequestRecord* record) const {
  const std::string claimed = std::move(record->tenant);
  record->tenant.clear();  // nobody's, until the token says whose
  ASSIGN_OR_RETURN(const absl::string_view token, BearerToken(context));
  std::optional<std::string> tenant = tokens_->TenantOf(token);
  if (!tenant.has_value()) return Unauthenticated("TOKEN_UNKNOWN", "the token is not known here, or no longer");
  record->tenant = *std::move(tenant);
  if (!claimed.empty() && claimed != record->tenant) {
    return WithErrorInfo(absl::PermissionDeniedError(
                             absl::StrCat("x-tenant is ", Printable(claimed), ", and the token another tenant's")),
                         "TENANT_MISMATCH");
  }
  if (caller == Caller::kOperator && record->tenant != admin_tenant_) {
    return WithErrorInfo(absl::PermissionDeniedError("only operators may call the AdminService"), "NOT_AN_OPERATOR");
  }
  return absl::OkStatus();
}

absl::Status CheckPhase(Phase phase, Resource resource) {
  if (resource == Resource::kNone) return absl::OkStatus();
  switch (phase) {
    case Phase::kLoading:
    case Phase::kWarming:
      return UnavailableRetry("the model is still loading", std::chrono::seconds(2));
    case Phase::kServing:
    case Phase::kLeaving:
      return absl::OkStatus();
    case Phase::kDraining:
      if (resource == Resource::kModel) return absl::OkStatus();
      return UnavailableRetry("the server is shutting down and takes no new requests", std::chrono::seconds(1));
    case Phase::kFailed:
      return UnavailableRetry("the engine has failed; the server is about to exit", std::chrono::seconds(5));
    case Phase::kStopped:
      return ServerStopped();
  }
  return absl::InternalError("unknown phase");
}

}  // namespace dejavu
