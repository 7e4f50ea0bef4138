#include "kernels/base/mapped_file.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace dejavu {

absl::StatusOr<std::shared_ptr<const MappedFile>> MappedFile::Map(const RegularFile& file) {
  CHECK(file.size() > 0) << file.path();
  void* const data = mmap(nullptr, file.size(), PROT_READ, MAP_SHARED, file.descriptor(), 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    return absl::ErrnoToStatus(error, absl::StrCat(file.path(), ": cannot map ", file.size(), " bytes"));
  }
  madvise(data, file.size(), MADV_HUGEPAGE);  // a hint, for what is not in the page cache yet
  return std::shared_ptr<const MappedFile>(new MappedFile(static_cast<char*>(data), file.size(), file.path()));
}

MappedFile::~MappedFile() { munmap(data_, size_); }

absl::Status MappedFile::Touch(int64_t offset, int64_t bytes) const {
  CHECK(offset >= 0 && bytes >= 0 && offset <= size_ && bytes <= size_ - offset) << bytes << " bytes at " << offset;
#ifdef MADV_POPULATE_READ
  const int64_t before = offset % sysconf(_SC_PAGESIZE);
  while (madvise(data_ + offset - before, bytes + before, MADV_POPULATE_READ) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno == EINVAL) break;  // an older kernel
    return absl::DataLossError(absl::StrCat(path_, ": cannot read ", bytes, " bytes at offset ", offset,
                                            " through a mapping: ", std::strerror(errno), "; it was mapped with ",
                                            size_, " bytes"));
  }
#endif
  return absl::OkStatus();
}

}  // namespace dejavu
