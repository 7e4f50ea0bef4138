#include "kernels/base/regular_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

absl::Status SystemError(int error, const std::string& path, absl::string_view action) {
  return absl::ErrnoToStatus(error, absl::StrCat(path, ": cannot ", action));
}

absl::Status CheckRegular(mode_t mode, const std::string& path) {
  if (S_ISREG(mode)) return absl::OkStatus();
  const char* const kind = S_ISDIR(mode)    ? "a directory"
                           : S_ISFIFO(mode) ? "a FIFO"
                           : S_ISSOCK(mode) ? "a socket"
                                            : "a device";
  return absl::InvalidArgumentError(absl::StrCat(path, ": is ", kind, ", not a regular file"));
}

}  // namespace

absl::StatusOr<std::shared_ptr<RegularFile>> RegularFile::Open(const std::string& path) {
  struct stat info;
  // Before it is opened: some devices act on that. After it, as another file may have the name by then.
  if (stat(path.c_str(), &info) != 0) return SystemError(errno, path, "open");
  RETURN_IF_ERROR(CheckRegular(info.st_mode, path));
  // O_NONBLOCK: opening a FIFO must not wait for its writer. It has no effect on regular files.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd < 0) return SystemError(errno, path, "open");
  if (fstat(fd, &info) != 0) {
    const int error = errno;
    close(fd);
    return SystemError(error, path, "stat");
  }
  std::shared_ptr<RegularFile> file(new RegularFile(fd, path, info.st_size));
  RETURN_IF_ERROR(CheckRegular(info.st_mode, path));
  return file;
}

RegularFile::~RegularFile() { close(fd_); }

absl::Status RegularFile::Read(int64_t offset, int64_t bytes, void* target) const {
  CHECK(offset >= 0 && bytes >= 0) << bytes << " bytes at " << offset;
  char* out = static_cast<char*>(target);
  for (int64_t done = 0; done < bytes;) {
    const ssize_t got = pread(fd_, out + done, bytes - done, offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return SystemError(errno, path_, absl::StrCat("read at byte ", offset + done));
    if (got == 0) {
      return absl::DataLossError(
          absl::StrCat(path_, ": ends within the ", bytes, " bytes at offset ", offset, "; it has ", size_, " bytes"));
    }
    done += got;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> RegularFile::ReadString(int64_t offset, int64_t bytes) const {
  if (offset > size_ || bytes > size_ - offset) {  // before the memory is taken
    return absl::DataLossError(
        absl::StrCat(path_, ": ends within the ", bytes, " bytes at offset ", offset, "; it has ", size_, " bytes"));
  }
  std::string text(bytes, '\0');
  RETURN_IF_ERROR(Read(offset, bytes, text.data()));
  return text;
}

absl::StatusOr<std::string> ReadRegularFile(const std::string& path, int64_t max_bytes) {
  ASSIGN_OR_RETURN(const std::shared_ptr<RegularFile> file, RegularFile::Open(path));
  if (file->size() > max_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": has ", file->size(), " bytes; the limit is ", max_bytes));
  }
  return file->ReadString(0, file->size());
}

}  // namespace dejavu
