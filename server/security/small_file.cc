#include "server/security/small_file.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/regular_file.h"

namespace dejavu {

absl::StatusOr<std::string> ReadSmallFile(absl::string_view option, const std::string& path, size_t max_bytes) {
  absl::StatusOr<std::string> text = ReadRegularFile(path, static_cast<int64_t>(max_bytes));
  if (text.ok()) return text;
  return absl::InvalidArgumentError(absl::StrCat(option, ": ", text.status().message()));
}

}  // namespace dejavu
