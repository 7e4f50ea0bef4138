// RETURN_IF_ERROR(expression) and ASSIGN_OR_RETURN(lhs, expression) for absl::Status and absl::StatusOr.
#ifndef KERNELS_BASE_STATUS_MACROS_H_
#define KERNELS_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define RETURN_IF_ERROR(expression)                            \
  do {                                                         \
    absl::Status status_macro_result = (expression);           \
    if (!status_macro_result.ok()) return status_macro_result; \
  } while (false)

#define STATUS_MACRO_CONCAT_INNER(a, b) a##b
#define STATUS_MACRO_CONCAT(a, b) STATUS_MACRO_CONCAT_INNER(a, b)
#define ASSIGN_OR_RETURN(lhs, expression) \
  ASSIGN_OR_RETURN_IMPL(STATUS_MACRO_CONCAT(status_or_, __LINE__), lhs, expression)
#define ASSIGN_OR_RETURN_IMPL(result, lhs, expression) \
  auto result = (expression);                          \
  if (!result.ok()) return result.status();            \
  lhs = std::move(result).value()

#endif  // KERNELS_BASE_STATUS_MACROS_H_
