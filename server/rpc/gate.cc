#include "server/rpc/gate.h"

#include <chrono>
#include <iterator>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

constexpr absl::string_view kGeneration = "/dejavu.v1.GenerationService/";
constexpr absl::string_view kAdmin = "/dejavu.v1.AdminService/";
constexpr absl::string_view kHealth = "/grpc.health.v1.Health/";  // open to probes, which know no token

enum class Needs {
  kNothing,   // answers in every phase: probes, reflection, what the server is
  kModel,     // needs a loaded model, goes on while the server drains
  kCapacity,  // new work for the engine
};

Needs NeedsOfAdmin(absl::string_view method) {
  return method == "GetEngineState" || method == "Drain" || method == "AbortRequest" ? Needs::kNothing : Needs::kModel;
}

Needs NeedsOf(absl::string_view method) {
  if (absl::StartsWith(method, kAdmin)) return NeedsOfAdmin(method.substr(kAdmin.size()));
  if (!absl::StartsWith(method, kGeneration)) return Needs::kNothing;
  method.remove_prefix(kGeneration.size());
  if (method == "GetServerInfo" || method == "Abort") return Needs::kNothing;
  if (method == "Tokenize" || method == "Detokenize" || method == "GetModelInfo") return Needs::kModel;
  return Needs::kCapacity;
}

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

absl::Status Gate::Admit(absl::string_view method, const grpc::CallbackServerContext& context,
                         RequestRecord* record) const {
  if (tokens_ != nullptr && !absl::StartsWith(method, kHealth)) {
    RETURN_IF_ERROR(CheckToken(method, context, record));
  }
  return CheckPhase(method);
}

absl::Status Gate::CheckToken(absl::string_view method, const grpc::CallbackServerContext& context,
                              RequestRecord* record) const {
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
  if (absl::StartsWith(method, kAdmin) && record->tenant != admin_tenant_) {
    return WithErrorInfo(absl::PermissionDeniedError("only operators may call the AdminService"), "NOT_AN_OPERATOR");
  }
  return absl::OkStatus();
}

absl::Status Gate::CheckPhase(absl::string_view method) const {
  const Needs needs = NeedsOf(method);
  if (needs == Needs::kNothing) return absl::OkStatus();
  switch (lifecycle_->phase()) {
    case Phase::kLoading:
    case Phase::kWarming:
      return UnavailableRetry("the model is still loading", std::chrono::seconds(2));
    case Phase::kServing:
    case Phase::kLeaving:
      return absl::OkStatus();
    case Phase::kDraining:
      if (needs == Needs::kModel) return absl::OkStatus();
      return UnavailableRetry("the server is shutting down and takes no new requests", std::chrono::seconds(1));
    case Phase::kFailed:
      return UnavailableRetry("the engine has failed; the server is about to exit", std::chrono::seconds(5));
    case Phase::kStopped:
      return UnavailableRetry("the server has stopped", std::chrono::seconds(1));
  }
  return absl::InternalError("unknown phase");
}

}  // namespace dejavu
