#include "server/security/small_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace dejavu {
namespace {

// A descriptor of a regular file, or the reason why there is none.
class RegularFile {
 public:
  // Without O_NONBLOCK the opening of a FIFO waits for whoever writes to it.
  explicit RegularFile(const std::string& path)
      : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)) {
    struct stat facts = {};
    if (fd_ < 0 || fstat(fd_, &facts) != 0) {
      problem_ = std::strerror(errno);
    } else if (!S_ISREG(facts.st_mode)) {
      problem_ = S_ISDIR(facts.st_mode) ? "it is a directory" : "it is no regular file";
    }
  }
  ~RegularFile() {
    if (fd_ >= 0) close(fd_);
  }
  RegularFile(const RegularFile&) = delete;
  RegularFile& operator=(const RegularFile&) = delete;

  // At most `max_bytes` of it; nothing where problem() says why.
  std::string Read(size_t max_bytes) {
    constexpr size_t kUsualBytes = 4096;
    std::string text;
    size_t have = 0;
    while (problem_.empty() && have < max_bytes) {
      if (have == text.size()) text.resize(std::min(max_bytes, std::max(kUsualBytes, 2 * have)));
      const ssize_t got = read(fd_, text.data() + have, text.size() - have);
      if (got == 0) break;
      if (got > 0) have += static_cast<size_t>(got);
      if (got < 0 && errno != EINTR) problem_ = std::strerror(errno);
    }
    text.resize(have);
    return text;
  }
  const std::string& problem() const { return problem_; }

 private:
  const int fd_;
  std::string problem_;
};

}  // namespace

absl::StatusOr<std::string> ReadSmallFile(absl::string_view option, const std::string& path, size_t max_bytes) {
  RegularFile file(path);
  std::string text = file.Read(max_bytes + 1);
  if (!file.problem().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(option, ": cannot read ", path, ": ", file.problem()));
  }
  if (text.size() <= max_bytes) return text;
  return absl::InvalidArgumentError(absl::StrCat(option, ": ", path, " has more than ", max_bytes, " bytes"));
}

}  // namespace dejavu
