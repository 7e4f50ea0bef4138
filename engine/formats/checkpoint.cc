#include "engine/formats/checkpoint.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
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
  ASSIGN_OR_RETURN(const std::string text, ReadRegularFile(path, kMaxIndexBytes));
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

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& directory) {
  constexpr const char* kNames[] = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                                    "pytorch_model.bin.index.json"};
  struct stat info;
  if (stat(directory.c_str(), &info) != 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat(directory, ": cannot open the model directory"));
  }
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
