// A file that is read whole: a certificate, a list of tokens. Any thread.
#ifndef SERVER_SECURITY_SMALL_FILE_H_
#define SERVER_SECURITY_SMALL_FILE_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dejavu {

// INVALID_ARGUMENT, with `option` and path, for what cannot be read, is no regular file (it would have us wait for
// whoever is at its other end), or has more than `max_bytes`.
absl::StatusOr<std::string> ReadSmallFile(absl::string_view option, const std::string& path, size_t max_bytes);

}  // namespace dejavu

#endif  // SERVER_SECURITY_SMALL_FILE_H_
