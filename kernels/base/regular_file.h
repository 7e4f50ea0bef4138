// RegularFile: a file that somebody else put under a name, such as a model, a token or a configuration. Directories,
// FIFOs, sockets and devices are refused, so that nothing ever waits for whoever is at their other end. Any thread.
#ifndef KERNELS_BASE_REGULAR_FILE_H_
#define KERNELS_BASE_REGULAR_FILE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace dejavu {

// Open, read by offset, and of a size that is known. All messages begin with the path.
class RegularFile {
 public:
  // INVALID_ARGUMENT for what is no regular file; what the system says otherwise, such as NOT_FOUND.
  static absl::StatusOr<std::shared_ptr<RegularFile>> Open(const std::string& path);
  ~RegularFile();
  RegularFile(const RegularFile&) = delete;
  RegularFile& operator=(const RegularFile&) = delete;

  // DATA_LOSS with the offset when the file ends before.
  absl::Status Read(int64_t offset, int64_t bytes, void* target) const;
  absl::StatusOr<std::string> ReadString(int64_t offset, int64_t bytes) const;

  const std::string& path() const { return path_; }
  int64_t size() const { return size_; }
  int descriptor() const { return fd_; }

 private:
  RegularFile(int fd, std::string path, int64_t size) : fd_(fd), path_(std::move(path)), size_(size) {}
  const int fd_;
  const std::string path_;
  const int64_t size_;
};

// All of a small file. INVALID_ARGUMENT with size and limit where it has more than `max_bytes`.
absl::StatusOr<std::string> ReadRegularFile(const std::string& path, int64_t max_bytes);

}  // namespace dejavu

#endif  // KERNELS_BASE_REGULAR_FILE_H_
