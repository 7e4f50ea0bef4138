#include "server/security/small_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace dejavu {

absl::StatusOr<std::string> ReadSmallFile(absl::string_view option, const std::string& path, size_t max_bytes) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rbe"), &std::fclose);
  std::string text(max_bytes + 1, '\0');
  if (file != nullptr) text.resize(std::fread(text.data(), 1, text.size(), file.get()));
  if (file == nullptr || std::ferror(file.get()) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(option, ": cannot read ", path, ": ", std::strerror(errno)));
  }
  if (text.size() <= max_bytes) return text;
  return absl::InvalidArgumentError(absl::StrCat(option, ": ", path, " has more than ", max_bytes, " bytes"));
}

}  // namespace dejavu
