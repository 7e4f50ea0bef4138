// A ZIP archive is its files, each behind a header, then a directory that repeats the headers with the files' places,
// then the directory's own place (APPNOTE 6.3, sections 4.3.7, 4.3.12 and 4.3.16).
#include "server/api/tokenizer_archive.h"

#include <openssl/sha.h>
#include <zlib.h>

#include <array>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/regular_file.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/error_details.h"

namespace dejavu {
namespace {

constexpr const char* kNames[] = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",  "vocab.json",
    "merges.txt",     "config.json",           "generation_config.json",  "chat_template.jinja"};
constexpr int64_t kMostFileBytes = 64 << 20;  // of one file: the largest vocabularies have 35 MB

constexpr uint32_t kFileMagic = 0x04034b50, kEntryMagic = 0x02014b50, kEndMagic = 0x06054b50;
constexpr uint16_t kVersion = 20;
constexpr uint32_t kDate = 0x00210000;  // 1980-01-01: the same files make the same archive

void Append16(uint16_t value, std::string* out) {
  out->push_back(static_cast<char>(value & 0xff));
  out->push_back(static_cast<char>(value >> 8));
}
void Append32(uint32_t value, std::string* out) {
  Append16(static_cast<uint16_t>(value & 0xffff), out);
  Append16(static_cast<uint16_t>(value >> 16), out);
}

// What a file's header and its entry have in common.
void AppendDescription(const std::string& name, const std::string& content, std::string* out) {
  const auto bytes = static_cast<uint32_t>(content.size());
  Append16(kVersion, out);
  Append16(0, out);  // flags
  Append16(0, out);  // stored as it is
  Append32(kDate, out);
  Append32(static_cast<uint32_t>(crc32(0, reinterpret_cast<const Bytef*>(content.data()), bytes)), out);
  Append32(bytes, out);
  Append32(bytes, out);
  Append16(static_cast<uint16_t>(name.size()), out);
  Append16(0, out);  // no extra field
}

absl::StatusOr<std::string> MakeArchive(const std::string& directory) {
  std::string archive, entries;
  uint16_t files = 0;
  for (const std::string name : kNames) {
    const absl::StatusOr<std::string> content = ReadRegularFile(absl::StrCat(directory, "/", name), kMostFileBytes);
    if (absl::IsNotFound(content.status())) continue;
    RETURN_IF_ERROR(content.status());
    Append32(kEntryMagic, &entries);
    Append16(kVersion, &entries);
    AppendDescription(name, *content, &entries);
    for (int i = 0; i < 3; ++i) Append16(0, &entries);  // no comment, disk 0, no attributes
    Append32(0, &entries);
    Append32(static_cast<uint32_t>(archive.size()), &entries);
    entries += name;
    Append32(kFileMagic, &archive);
    AppendDescription(name, *content, &archive);
    archive += name;
    archive += *content;
    ++files;
  }
  if (files == 0) return MissingFeature("tokenizer", "the model has no tokenizer files");
  const auto directory_at = static_cast<uint32_t>(archive.size());
  archive += entries;
  Append32(kEndMagic, &archive);
  Append32(0, &archive);  // disks
  Append16(files, &archive);
  Append16(files, &archive);
  Append32(static_cast<uint32_t>(entries.size()), &archive);
  Append32(directory_at, &archive);
  Append16(0, &archive);  // no comment
  return archive;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const TokenizerArchive>> TokenizerArchives::Get(const std::string& directory) {
  MutexLock lock(mutex_);
  if (made_ != nullptr) return made_;
  ASSIGN_OR_RETURN(std::string bytes, MakeArchive(directory));
  std::array<uint8_t, SHA256_DIGEST_LENGTH> hash;
  SHA256(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), hash.data());
  std::string digits =
      absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(hash.data()), hash.size()));
  made_ = std::make_shared<const TokenizerArchive>(TokenizerArchive{std::move(bytes), std::move(digits)});
  return made_;
}

}  // namespace dejavu
