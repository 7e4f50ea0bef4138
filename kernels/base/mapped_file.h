// MappedFile: a file as memory to be read only. The memory is the page cache's own: nothing is copied, every process
// that maps the file shares it, and the system may drop it and read it again. Any thread.
//
// Whoever writes to the file changes the memory, and whoever cuts it short ends this process by SIGBUS at the next
// touch of what is gone: files are to be replaced by others of the same name.
#ifndef KERNELS_BASE_MAPPED_FILE_H_
#define KERNELS_BASE_MAPPED_FILE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/regular_file.h"

namespace dejavu {

class MappedFile {
 public:
  // Of the size that `file` had when it was opened, which is not 0.
  static absl::StatusOr<std::shared_ptr<const MappedFile>> Map(const RegularFile& file);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // Page-aligned.
  const char* data() const { return data_; }
  int64_t size() const { return size_; }

  // Brings [offset, offset + bytes) into memory and into the page table, so that nothing waits for it later. DATA_LOSS
  // where it cannot be read, such as from a file that has been cut short. Kernels before Linux 5.14 do nothing here.
  absl::Status Touch(int64_t offset, int64_t bytes) const;

 private:
  MappedFile(char* data, int64_t size, std::string path) : data_(data), size_(size), path_(std::move(path)) {}
  char* const data_;
  const int64_t size_;
  const std::string path_;
};

}  // namespace dejavu

#endif  // KERNELS_BASE_MAPPED_FILE_H_
