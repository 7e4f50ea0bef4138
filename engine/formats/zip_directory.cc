// PKWARE APPNOTE 6.3: a zip archive is read from its end. The end record (4.3.16) gives the central directory; where a
// field of it is all ones, the zip64 end record (4.3.14), found through a locator (4.3.15), has the real value. The
// directory's headers (4.3.12) give names, sizes and the local headers (4.3.7), behind which the data lie. Sizes are
// taken from the directory only: a writer that streams, as torch does, leaves them out of the local header.
#include "engine/formats/zip_directory.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int64_t kEndBytes = 22;
constexpr int64_t kMaxCommentBytes = 65535;
constexpr int64_t kLocatorBytes = 20;
constexpr int64_t kEnd64Bytes = 56;
constexpr int64_t kCentralBytes = 46;
constexpr int64_t kLocalBytes = 30;
constexpr int64_t kMaxDirectoryBytes = int64_t{64} << 20;

constexpr uint32_t kEndSignature = 0x06054b50;
constexpr uint32_t kLocatorSignature = 0x07064b50;
constexpr uint32_t kEnd64Signature = 0x06064b50;
constexpr uint32_t kCentralSignature = 0x02014b50;
constexpr uint32_t kLocalSignature = 0x04034b50;

uint64_t Unsigned(absl::string_view bytes, size_t offset, int width) {
  CHECK(offset + width <= bytes.size()) << offset << " + " << width << " of " << bytes.size() << " bytes";
  uint64_t value = 0;
  for (int i = width - 1; i >= 0; --i) value = value << 8 | static_cast<uint8_t>(bytes[offset + i]);
  return value;
}
uint16_t U16(absl::string_view bytes, size_t offset) { return Unsigned(bytes, offset, 2); }
uint32_t U32(absl::string_view bytes, size_t offset) { return Unsigned(bytes, offset, 4); }
uint64_t U64(absl::string_view bytes, size_t offset) { return Unsigned(bytes, offset, 8); }

// Where the central directory lies.
struct DirectoryExtent {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  uint64_t entries = 0;
};

// A header of the central directory, its zip64 fields resolved.
struct CentralHeader {
  std::string name;
  uint64_t local_offset = 0;
  uint64_t bytes = 0;
  uint16_t method = 0;
};

absl::StatusOr<DirectoryExtent> ReadZip64End(const RegularFile& file, int64_t end_offset) {
  if (end_offset < kLocatorBytes) return Refuse(file, "truncated zip archive: no zip64 locator");
  ASSIGN_OR_RETURN(const std::string locator, file.ReadString(end_offset - kLocatorBytes, kLocatorBytes));
  if (U32(locator, 0) != kLocatorSignature) return Refuse(file, "damaged zip archive: no zip64 locator");
  const uint64_t offset = U64(locator, 8);
  const int64_t latest = end_offset - kLocatorBytes - kEnd64Bytes;
  if (latest < 0 || offset > static_cast<uint64_t>(latest)) {
    return Refuse(file,
                  absl::StrCat("damaged zip archive: zip64 end record at ", offset, " of ", file.size(), " bytes"));
  }
  ASSIGN_OR_RETURN(const std::string end, file.ReadString(static_cast<int64_t>(offset), kEnd64Bytes));
  if (U32(end, 0) != kEnd64Signature)
    return Refuse(file, "damaged zip archive: no zip64 end record where it should be");
  if (U32(end, 16) != 0 || U32(end, 20) != 0) return Refuse(file, "a zip archive of several parts is not supported");
  return DirectoryExtent{.offset = U64(end, 48), .bytes = U64(end, 40), .entries = U64(end, 32)};
}

absl::StatusOr<DirectoryExtent> FindDirectory(const RegularFile& file) {
  const int64_t tail_bytes = std::min(file.size(), kEndBytes + kMaxCommentBytes);
  ASSIGN_OR_RETURN(const std::string tail, file.ReadString(file.size() - tail_bytes, tail_bytes));
  int64_t at = tail_bytes - kEndBytes;
  while (at >= 0 && !(U32(tail, at) == kEndSignature && at + kEndBytes + U16(tail, at + 20) == tail_bytes)) --at;
  if (at < 0) return Refuse(file, "truncated zip archive: no end of central directory");
  if (U16(tail, at + 4) != 0 || U16(tail, at + 6) != 0) {
    return Refuse(file, "a zip archive of several parts is not supported");
  }
  const int64_t end_offset = file.size() - tail_bytes + at;
  DirectoryExtent extent{.offset = U32(tail, at + 16), .bytes = U32(tail, at + 12), .entries = U16(tail, at + 10)};
  if (extent.offset == 0xffffffff || extent.bytes == 0xffffffff || extent.entries == 0xffff) {
    ASSIGN_OR_RETURN(extent, ReadZip64End(file, end_offset));
  }
  if (extent.bytes > static_cast<uint64_t>(std::min(kMaxDirectoryBytes, end_offset)) ||
      extent.offset > end_offset - extent.bytes) {
    return Refuse(
        file, absl::StrCat("damaged zip archive: a central directory of ", extent.bytes, " bytes at ", extent.offset,
                           " of ", file.size(), " bytes (the limit is ", kMaxDirectoryBytes, ")"));
  }
  return extent;
}

// Replaces the sizes and the offset that are all ones by the values of the zip64 field (4.5.3), which has just these,
// in this order. False when they are not there.
bool ResolveZip64(absl::string_view extra, uint64_t* uncompressed, uint64_t* compressed, uint64_t* offset) {
  std::vector<uint64_t*> missing;
  for (uint64_t* value : {uncompressed, compressed, offset}) {
    if (*value == 0xffffffff) missing.push_back(value);
  }
  while (!missing.empty() && extra.size() >= 4) {
    const uint16_t id = U16(extra, 0);
    const absl::string_view field = extra.substr(4, U16(extra, 2));
    if (field.size() < U16(extra, 2)) return false;
    extra.remove_prefix(4 + field.size());
    if (id != 0x0001) continue;
    if (field.size() < 8 * missing.size()) return false;
    for (size_t i = 0; i < missing.size(); ++i) *missing[i] = U64(field, 8 * i);
    return true;
  }
  return missing.empty();
}

// Takes one header off the front of `directory`.
absl::StatusOr<CentralHeader> NextHeader(const RegularFile& file, absl::string_view* directory) {
  const absl::string_view header = *directory;
  if (header.size() < kCentralBytes || U32(header, 0) != kCentralSignature) {
    return Refuse(file, "damaged zip archive: the central directory breaks off");
  }
  const size_t name_bytes = U16(header, 28);
  const size_t extra_bytes = U16(header, 30);
  const size_t total_bytes = kCentralBytes + name_bytes + extra_bytes + U16(header, 32);
  if (header.size() < total_bytes) return Refuse(file, "damaged zip archive: the central directory breaks off");
  CentralHeader entry;
  entry.name = std::string(header.substr(kCentralBytes, name_bytes));
  entry.method = U16(header, 10);
  entry.local_offset = U32(header, 42);
  entry.bytes = U32(header, 24);
  uint64_t compressed = U32(header, 20);
  const auto refuse = [&](absl::string_view reason) {
    return Refuse(file, absl::StrCat("entry ", Quoted(entry.name), " ", reason));
  };
  if ((U16(header, 8) & 1) != 0) return refuse("is encrypted");
  if (entry.method != 0) {
    return refuse(
        absl::StrCat("is compressed (method ", entry.method, "); torch.save only stores, and so must this file"));
  }
  if (!ResolveZip64(header.substr(kCentralBytes + name_bytes, extra_bytes), &entry.bytes, &compressed,
                    &entry.local_offset)) {
    return refuse("has a damaged zip64 field");
  }
  if (compressed != entry.bytes) return refuse(absl::StrCat("has ", compressed, " stored bytes for ", entry.bytes));
  directory->remove_prefix(total_bytes);
  return entry;
}

// Checks the entry's local header and that the entry ends before the central directory.
absl::StatusOr<ZipEntry> Locate(const RegularFile& file, const CentralHeader& entry, uint64_t directory_offset) {
  const auto refuse = [&](absl::string_view reason) {
    return Refuse(file, absl::StrCat("entry ", Quoted(entry.name), " ", reason));
  };
  if (directory_offset < kLocalBytes || entry.local_offset > directory_offset - kLocalBytes) {
    return refuse(
        absl::StrCat("begins at ", entry.local_offset, ", not before the central directory at ", directory_offset));
  }
  ASSIGN_OR_RETURN(const std::string local, file.ReadString(static_cast<int64_t>(entry.local_offset), kLocalBytes));
  if (U32(local, 0) != kLocalSignature) return refuse("has no local header");
  if (U16(local, 8) != entry.method || U16(local, 26) != entry.name.size()) {
    return refuse("has a local header that contradicts the central directory");
  }
  const uint64_t name_offset = entry.local_offset + kLocalBytes;
  const uint64_t data_offset = name_offset + entry.name.size() + U16(local, 28);
  if (data_offset > directory_offset || entry.bytes > directory_offset - data_offset) {
    return refuse(absl::StrCat("has ", entry.bytes, " bytes at ", data_offset, ", not before the central directory at ",
                               directory_offset));
  }
  ASSIGN_OR_RETURN(const std::string name, file.ReadString(static_cast<int64_t>(name_offset), entry.name.size()));
  if (name != entry.name) return refuse(absl::StrCat("is called ", Quoted(name), " in its local header"));
  return ZipEntry{static_cast<int64_t>(data_offset), static_cast<int64_t>(entry.bytes)};
}

struct Span {
  uint64_t begin = 0;  // of the local header
  uint64_t end = 0;    // of the data
};

}  // namespace

absl::StatusOr<ZipDirectory> ReadZipDirectory(const RegularFile& file) {
  ASSIGN_OR_RETURN(const DirectoryExtent extent, FindDirectory(file));
  ASSIGN_OR_RETURN(const std::string bytes,
                   file.ReadString(static_cast<int64_t>(extent.offset), static_cast<int64_t>(extent.bytes)));
  ZipDirectory entries;
  std::vector<Span> spans;
  for (absl::string_view rest = bytes; !rest.empty();) {
    ASSIGN_OR_RETURN(const CentralHeader header, NextHeader(file, &rest));
    ASSIGN_OR_RETURN(const ZipEntry entry, Locate(file, header, extent.offset));
    if (!entries.emplace(header.name, entry).second) {
      return Refuse(file, absl::StrCat("entry ", Quoted(header.name), " appears twice"));
    }
    spans.push_back({header.local_offset, static_cast<uint64_t>(entry.offset + entry.bytes)});
  }
  if (entries.size() != extent.entries) {
    return Refuse(file, absl::StrCat("damaged zip archive: ", entries.size(), " entries where its end record counts ",
                                     extent.entries));
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i].begin < spans[i - 1].end) {
      return Refuse(file, absl::StrCat("two entries of the zip archive overlap at byte ", spans[i].begin));
    }
  }
  return entries;
}

}  // namespace dejavu
