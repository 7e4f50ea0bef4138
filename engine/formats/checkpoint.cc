#include "engine/formats/checkpoint.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/formats/json_text.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int64_t kMaxIndexBytes = int64_t{64} << 20;
constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 8;  // 8: the largest element of any stored type

absl::Status SystemError(int error, const std::string& path, absl::string_view action) {
  const std::string message = absl::StrCat(path, ": cannot ", action, ": ", std::strerror(error));
  if (error == ENOENT) return absl::NotFoundError(message);
  if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(message);
  return absl::UnavailableError(message);
}

// What stands in place of the weights where a repository was cloned without Git LFS: worth a message of its own.
absl::Status RefuseLfsPointer(const std::string& path) {
  constexpr absl::string_view kStart = "version https://git-lfs";
  ASSIGN_OR_RETURN(const auto file, RandomAccessFile::Open(path));
  if (file->size() < static_cast<int64_t>(kStart.size())) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::string start, file->ReadString(0, kStart.size()));
  if (start != kStart) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(path, ": a Git LFS pointer, not the weights; fetch them with \"git lfs pull\""));
}

absl::StatusOr<TensorMap> ReadFile(const std::string& path) {
  RETURN_IF_ERROR(RefuseLfsPointer(path));
  return absl::EndsWith(path, ".safetensors") ? ReadSafetensorsHeader(path) : ReadTorchArchive(path);
}

// A file beside the index and nothing else: an index must not lead the reader elsewhere.
bool IsShardName(absl::string_view name, absl::string_view extension) {
  return name.size() <= 255 && absl::EndsWith(name, extension) && !absl::StrContains(name, '/') &&
         !absl::StrContains(name, '\\') && !absl::StrContains(name, "..") && !absl::StrContains(name, '\0');
}

// The index decides where a tensor is read from; what shards hold beyond it is not part of the model.
absl::StatusOr<TensorMap> ReadIndexed(const std::string& directory, const std::string& path) {
  ASSIGN_OR_RETURN(const auto file, RandomAccessFile::Open(path));
  if (file->size() > kMaxIndexBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": an index of ", file->size(), " bytes; the limit is ", kMaxIndexBytes));
  }
  ASSIGN_OR_RETURN(const std::string text, file->ReadString(0, file->size()));
  ASSIGN_OR_RETURN(const nlohmann::json index, ParseJsonObject(text, path));
  const auto weights = index.find("weight_map");
  if (weights == index.end() || !weights->is_object() || weights->empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": no object \"weight_map\" with tensor names"));
  }
  const absl::string_view extension = absl::EndsWith(path, ".safetensors.index.json") ? ".safetensors" : ".bin";
  absl::flat_hash_map<std::string, TensorMap> shards;
  TensorMap tensors;
  for (const auto& [name, shard] : weights->items()) {
    if (!shard.is_string() || !IsShardName(shard.get_ref<const std::string&>(), extension)) {
      const std::string target = shard.is_string() ? Quoted(shard.get_ref<const std::string&>()) : shard.type_name();
      return absl::InvalidArgumentError(absl::StrCat(path, ": tensor ", Quoted(name), " is mapped to ", target,
                                                     ", not to the name of a ", extension,
                                                     " file in the same directory"));
    }
    const std::string shard_path = absl::StrCat(directory, "/", shard.get_ref<const std::string&>());
    auto [read, is_new] = shards.try_emplace(shard_path);
    if (is_new) {
      absl::StatusOr<TensorMap> contents = ReadFile(shard_path);
      if (!contents.ok()) {
        return absl::Status(contents.status().code(), absl::StrCat(contents.status().message(), " (shard of tensor ",
                                                                   Quoted(name), " in ", path, ")"));
      }
      read->second = *std::move(contents);
    }
    const auto tensor = read->second.find(name);
    if (tensor == read->second.end()) {
      return absl::InvalidArgumentError(absl::StrCat(shard_path, ": no tensor ", Quoted(name),
                                                     " of type float32, float16 or bfloat16, but ", path,
                                                     " says that it is here"));
    }
    tensors.emplace(name, tensor->second);
  }
  return tensors;
}

// True for a dangling link too, so that it is reported and not passed over.
bool Exists(const std::string& path) {
  struct stat info;
  return lstat(path.c_str(), &info) == 0;
}

}  // namespace

absl::StatusOr<std::shared_ptr<RandomAccessFile>> RandomAccessFile::Open(const std::string& path) {
  // O_NONBLOCK: opening a FIFO must not wait for its writer; it has no effect on regular files.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return SystemError(errno, path, "open");
  struct stat info;
  if (fstat(fd, &info) != 0) {
    const int error = errno;
    close(fd);
    return SystemError(error, path, "stat");
  }
  if (!S_ISREG(info.st_mode)) {
    close(fd);
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  return std::shared_ptr<RandomAccessFile>(new RandomAccessFile(fd, path, info.st_size));
}

RandomAccessFile::~RandomAccessFile() { close(fd_); }

absl::Status RandomAccessFile::Read(int64_t offset, int64_t bytes, void* target) const {
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

absl::StatusOr<std::string> RandomAccessFile::ReadString(int64_t offset, int64_t bytes) const {
  if (offset > size_ || bytes > size_ - offset) {  // before the memory is taken
    return absl::DataLossError(
        absl::StrCat(path_, ": ends within the ", bytes, " bytes at offset ", offset, "; it has ", size_, " bytes"));
  }
  std::string text(bytes, '\0');
  RETURN_IF_ERROR(Read(offset, bytes, text.data()));
  return text;
}

absl::Status Refuse(const RandomAccessFile& file, absl::string_view reason) {
  return absl::InvalidArgumentError(absl::StrCat(file.path(), ": ", reason));
}

absl::StatusOr<int64_t> ElementCount(absl::Span<const int64_t> shape) {
  if (shape.size() > kMaxDimensions) {
    return absl::InvalidArgumentError(absl::StrCat("has ", shape.size(), " dimensions; the limit is ", kMaxDimensions));
  }
  int64_t elements = 1;
  for (const int64_t dimension : shape) {
    if (dimension < 0 || __builtin_mul_overflow(elements, dimension, &elements) || elements > kMaxElements) {
      return absl::InvalidArgumentError(absl::StrCat("has an impossible shape [", absl::StrJoin(shape, ", "), "]"));
    }
  }
  return elements;
}

std::string Quoted(absl::string_view name) {
  constexpr size_t kMaxShown = 200;
  const std::string shown = absl::CHexEscape(name.substr(0, kMaxShown));
  return absl::StrCat("\"", shown, name.size() > kMaxShown ? "...\"" : "\"");
}

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& directory) {
  constexpr const char* kNames[] = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                                    "pytorch_model.bin.index.json"};
  struct stat info;
  if (stat(directory.c_str(), &info) != 0) return SystemError(errno, directory, "open the model directory");
  if (!S_ISDIR(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(directory, ": not a directory"));
  for (const char* name : kNames) {
    const std::string path = absl::StrCat(directory, "/", name);
    if (!Exists(path)) continue;
    Checkpoint checkpoint;
    ASSIGN_OR_RETURN(checkpoint.tensors_,
                     absl::EndsWith(path, ".json") ? ReadIndexed(directory, path) : ReadFile(path));
    return checkpoint;
  }
  return absl::NotFoundError(absl::StrCat(directory, ": no weights; looked for ", absl::StrJoin(kNames, ", ")));
}

const StoredTensor* Checkpoint::Find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

absl::Status Checkpoint::Read(const StoredTensor& tensor, int64_t first, int64_t count, void* target) {
  CHECK(first >= 0 && count >= 0 && first <= tensor.elements && count <= tensor.elements - first)
      << first << " + " << count << " of " << tensor.elements << " elements of " << tensor.name;
  const int64_t size = SizeOf(tensor.dtype);
  return tensor.file->Read(tensor.offset + first * size, count * size, target);
}

}  // namespace dejavu
