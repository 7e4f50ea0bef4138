// Errors with google.rpc details. An absl::Status carries each detail as a payload under the detail's Google type URL,
// and the advice to try again as the engine does (engine/refusal.h); ToGrpcStatus packs both into
// `grpc-status-details-bin`, where grpcio-status and its like find them. Any thread.
#ifndef SERVER_RPC_ERROR_DETAILS_H_
#define SERVER_RPC_ERROR_DETAILS_H_

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "grpcpp/support/status.h"

namespace dejavu {

// What ErrorInfo names as its domain.
inline constexpr char kErrorDomain[] = "dejavud";

// INVALID_ARGUMENT, "`field` `problem`", with BadRequest. `problem` holds the value and the limit.
absl::Status InvalidField(absl::string_view field, absl::string_view problem);

// What one protocol calls a field of another: a prefix of the first is replaced by the second.
struct FieldName {
  absl::string_view ours, theirs;
};
// An error of InvalidField with the other name, by the first entry that fits; others as they are.
absl::Status WithFieldNames(absl::Status status, absl::Span<const FieldName> names);

// NOT_FOUND, ALREADY_EXISTS and others: `status` with ErrorInfo. Reasons are UPPER_SNAKE_CASE.
absl::Status WithErrorInfo(absl::Status status, absl::string_view reason,
                           const std::vector<std::pair<std::string, std::string>>& metadata = {});

// UNAVAILABLE with RetryInfo: the same request may succeed after `delay`, here or elsewhere.
absl::Status UnavailableRetry(absl::string_view message, std::chrono::milliseconds delay);

// Such errors of a server that ends: of a call that it does not take any more, and of one that it has cut off.
absl::Status ServerStopped();
absl::Status StoppedBeforeDone();

// RESOURCE_EXHAUSTED with QuotaFailure and RetryInfo.
absl::Status QuotaExceeded(absl::string_view subject, absl::string_view message, std::chrono::milliseconds delay);

// FAILED_PRECONDITION with PreconditionFailure: the server as it was started cannot do that.
absl::Status MissingFeature(absl::string_view subject, absl::string_view message);

// A client's string as it may stand in a message: valid UTF-8, printable, cut after `max_bytes`, in quotes.
std::string Printable(absl::string_view text, size_t max_bytes = 64);

// The one place where a status becomes what the client hears. RetryInfo is there for every refusal that says when to
// try again; where the engine refused, so are ErrorInfo with its reason and, for RESOURCE_EXHAUSTED, QuotaFailure.
// Message and details together stay below 4 KiB, as clients limit the metadata that they accept (8 KiB by default): a
// long message is cut, details that do not fit are left out.
grpc::Status ToGrpcStatus(const absl::Status& status);

}  // namespace dejavu

#endif  // SERVER_RPC_ERROR_DETAILS_H_
