// The table of contents of a zip archive that only stores (torch.save never compresses). A compressed or encrypted
// entry is an error, so there is no bomb to unpack; every entry lies within the file and shares no byte with another.
// Any thread.
#ifndef ENGINE_FORMATS_ZIP_DIRECTORY_H_
#define ENGINE_FORMATS_ZIP_DIRECTORY_H_

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "engine/formats/checkpoint.h"

namespace dejavu {

struct ZipEntry {
  int64_t offset = 0;  // of the entry's bytes in the file
  int64_t bytes = 0;
};

using ZipDirectory = absl::flat_hash_map<std::string, ZipEntry>;

absl::StatusOr<ZipDirectory> ReadZipDirectory(const RegularFile& file);

}  // namespace dejavu

#endif  // ENGINE_FORMATS_ZIP_DIRECTORY_H_
