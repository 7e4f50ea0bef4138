#include "engine/formats/checkpoint.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <map>
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

// What stands in place of the weights where a repository was cloned without Git LFS: worth a message of its own.
absl::Status RefuseLfsPointer(const std::string& path) {
  constexpr absl::string_view kStart = "version https://git-lfs";
  ASSIGN_OR_RETURN(const auto file, RegularFile::Open(path));
  if (file->size() < static_cast<int64_t>(kStart.size())) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::string start, file->ReadString(0, kStart.size()));
  if (start != kStart) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(path, ": a Git LFS pointer, not the weights; fetch them with \"git lfs pull\""));
}

absl::StatusOr<FileTensors> ReadFile(const std::string& path) {
  RETURN_IF_ERROR(RefuseLfsPointer(path));
  return absl::EndsWith(path, ".safetensors") ? ReadSafetensorsHeader(path) : ReadTorchArchive(path);
}

// What `file` holds takes the place of what `all` has of the same names.
void Merge(FileTensors file, FileTensors* all) {
  for (auto& [name, tensor] : file.tensors) {
    all->foreign.erase(name);
    all->tensors.insert_or_assign(name, std::move(tensor));
  }
  for (auto& [name, tensor] : file.foreign) {
    all->tensors.erase(name);
    all->foreign.insert_or_assign(name, std::move(tensor));
  }
}

// A file beside the index and nothing else: an index must not lead the reader elsewhere.
bool IsShardName(absl::string_view name, absl::string_view extension) {
  return name.size() <= 255 && absl::EndsWith(name, extension) && !absl::StrContains(name, '/') &&
         !absl::StrContains(name, '\\') && !absl::StrContains(name, "..") && !absl::StrContains(name, '\0');
}

// True for a dangling link too, so that it is reported and not passed over.
bool Exists(const std::string& path) {
  struct stat info;
  return lstat(path.c_str(), &info) == 0;
}

}  // namespace

absl::Status Refuse(const RegularFile& file, absl::string_view reason) {
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

absl::Status Checkpoint::ReadIndexed(const std::string& directory) {
  ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(path_, kMaxIndexBytes));
  ASSIGN_OR_RETURN(const nlohmann::json index, ParseJsonObject(text, path_, JsonDialect::kPython));
  const auto weights = index.find("weight_map");
  if (weights == index.end() || !weights->is_object() || weights->empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": no object \"weight_map\" with tensor names"));
  }
  const absl::string_view extension = absl::EndsWith(path_, ".safetensors.index.json") ? ".safetensors" : ".bin";
  std::map<std::string, std::string> shards;  // the first tensor of each, for messages
  for (const auto& [name, shard] : weights->items()) {
    if (!shard.is_string() || !IsShardName(shard.get_ref<const std::string&>(), extension)) {
      const std::string target = shard.is_string() ? Quoted(shard.get_ref<const std::string&>()) : shard.type_name();
      return absl::InvalidArgumentError(absl::StrCat(path_, ": tensor ", Quoted(name), " is mapped to ", target,
                                                     ", not to the name of a ", extension,
                                                     " file in the same directory"));
    }
    shards.try_emplace(shard.get<std::string>(), name);
  }
  for (const auto& [shard, tensor] : shards) {
    absl::StatusOr<FileTensors> contents = ReadFile(absl::StrCat(directory, "/", shard));
    if (!contents.ok()) {
      return absl::Status(contents.status().code(), absl::StrCat(contents.status().message(), " (shard of tensor ",
                                                                 Quoted(tensor), " in ", path_, ")"));
    }
    Merge(*std::move(contents), &files_);
  }
  for (const auto& [name, shard] : weights->items()) {
    if (files_.tensors.contains(name) || files_.foreign.contains(name)) continue;
    promised_.emplace(name, absl::StrCat(directory, "/", shard.get_ref<const std::string&>()));
  }
  return absl::OkStatus();
}

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& directory) {
  constexpr const char* kNames[] = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                                    "pytorch_model.bin.index.json"};
  struct stat info;
  if (stat(directory.c_str(), &info) != 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat(directory, ": cannot open the model directory"));
  }
  if (!S_ISDIR(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(directory, ": not a directory"));
  for (const char* name : kNames) {
    Checkpoint checkpoint;
    checkpoint.path_ = absl::StrCat(directory, "/", name);
    if (!Exists(checkpoint.path_)) continue;
    if (absl::EndsWith(name, ".json")) {
      RETURN_IF_ERROR(checkpoint.ReadIndexed(directory));
    } else {
      ASSIGN_OR_RETURN(checkpoint.files_, ReadFile(checkpoint.path_));
    }
    return checkpoint;
  }
  return absl::NotFoundError(absl::StrCat(directory, ": no weights; looked for ", absl::StrJoin(kNames, ", ")));
}

const StoredTensor* Checkpoint::Find(const std::string& name) const {
  const auto found = files_.tensors.find(name);
  return found == files_.tensors.end() ? nullptr : &found->second;
}

bool Checkpoint::IsExpected(const std::string& name) const {
  return files_.foreign.contains(name) || promised_.contains(name);
}

absl::Status Checkpoint::Missing(const std::string& name) const {
  if (const auto foreign = files_.foreign.find(name); foreign != files_.foreign.end()) {
    return absl::InvalidArgumentError(absl::StrCat(foreign->second.path, ": tensor ", name, " is of type ",
                                                   foreign->second.type,
                                                   "; weights must be float32, float16 or bfloat16"));
  }
  if (const auto promised = promised_.find(name); promised != promised_.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat(promised->second, ": no tensor ", Quoted(name), ", but ", path_, " says that it is here"));
  }
  return absl::InvalidArgumentError(absl::StrCat(path_, ": tensor ", name, " is missing"));
}

absl::Status Checkpoint::Read(const StoredTensor& tensor, int64_t first, int64_t count, void* target) {
  CHECK(first >= 0 && count >= 0 && first <= tensor.elements && count <= tensor.elements - first)
      << first << " + " << count << " of " << tensor.elements << " elements of " << tensor.name;
  const int64_t size = SizeOf(tensor.dtype);
  return tensor.file->Read(tensor.offset + first * size, count * size, target);
}

}  // namespace dejavu
