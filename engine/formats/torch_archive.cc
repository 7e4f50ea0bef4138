// What torch.save has written since 1.6: a zip archive with one folder, in it data.pkl, which describes the tensors,
// the raw storages data/<key>, and byteorder.
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "engine/formats/checkpoint.h"
#include "engine/formats/torch_pickle.h"
#include "engine/formats/zip_directory.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int64_t kMaxPickleBytes = int64_t{16} << 20;  // that of OPT-175B would be below 1 MiB

// Says what a file is that is not a zip archive at all.
absl::Status CheckIsZip(const RegularFile& file) {
  if (file.size() < 4) return Refuse(file, absl::StrCat(file.size(), " bytes are too few for a PyTorch file"));
  ASSIGN_OR_RETURN(const std::string start, file.ReadString(0, 4));
  if (start == absl::string_view("PK\x03\x04", 4)) return absl::OkStatus();
  if (start[0] == '\x80') {
    return Refuse(file,
                  "in the format of PyTorch before 1.6, which is not read; convert it with a later version: "
                  "torch.save(torch.load(path, weights_only=True), path)");
  }
  return Refuse(file, "not a PyTorch file (no zip archive)");
}

// The archive's one folder, with its slash.
absl::StatusOr<std::string> FindFolder(const RegularFile& file, const ZipDirectory& entries) {
  std::string folder;
  for (const auto& [name, entry] : entries) {
    absl::string_view prefix = name;
    if (!absl::ConsumeSuffix(&prefix, "/data.pkl")) continue;
    if (!folder.empty()) return Refuse(file, "the zip archive has two entries data.pkl");
    folder = absl::StrCat(prefix, "/");
  }
  if (folder.empty()) return Refuse(file, "not a PyTorch file (the zip archive has no data.pkl)");
  return folder;
}

absl::Status CheckByteOrder(const RegularFile& file, const ZipDirectory& entries, const std::string& folder) {
  const auto entry = entries.find(folder + "byteorder");
  if (entry == entries.end()) return absl::OkStatus();  // before torch 2.1: little
  if (entry->second.bytes > 16) return Refuse(file, "entry byteorder is too long");
  ASSIGN_OR_RETURN(const std::string order, file.ReadString(entry->second.offset, entry->second.bytes));
  if (order == "little") return absl::OkStatus();
  return Refuse(file, absl::StrCat("byte order ", Quoted(order), "; only \"little\" is read"));
}

// The tensor's rows must lie one after the other; the stride of a dimension of size 1 says nothing.
bool IsContiguous(const PickledTensor& tensor) {
  int64_t expected = 1;
  for (size_t i = tensor.shape.size(); i-- > 0;) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

// Resolves a tensor of a type that the engine knows; the message lacks file and name.
absl::StatusOr<StoredTensor> Resolve(const PickledTensor& tensor, const ZipDirectory& entries,
                                     const std::string& folder) {
  ASSIGN_OR_RETURN(const int64_t elements, ElementCount(tensor.shape));
  if (elements > 0 && !IsContiguous(tensor)) {
    return absl::InvalidArgumentError(absl::StrCat("is not contiguous: shape [", absl::StrJoin(tensor.shape, ", "),
                                                   "], strides [", absl::StrJoin(tensor.strides, ", "),
                                                   "]; save it with .contiguous()"));
  }
  const auto storage = entries.find(absl::StrCat(folder, "data/", tensor.storage));
  if (storage == entries.end()) {
    return absl::InvalidArgumentError(absl::StrCat("lies in storage ", Quoted(tensor.storage), ", which is missing"));
  }
  const int64_t size = SizeOf(*tensor.dtype);
  if (storage->second.bytes % size != 0 || storage->second.bytes / size != tensor.storage_elements) {
    return absl::InvalidArgumentError(absl::StrCat("lies in a storage of ", tensor.storage_elements, " elements of ",
                                                   Name(*tensor.dtype), ", but the file has ", storage->second.bytes,
                                                   " bytes of it"));
  }
  if (elements > tensor.storage_elements - tensor.offset) {  // none of the three is negative
    return absl::InvalidArgumentError(
        absl::StrCat("has ", elements, " elements at ", tensor.offset, " in a storage of ", tensor.storage_elements));
  }
  StoredTensor stored;
  stored.name = tensor.name;
  stored.dtype = *tensor.dtype;
  stored.shape = tensor.shape;
  stored.elements = elements;
  stored.offset = storage->second.offset + tensor.offset * size;
  return stored;
}

}  // namespace

absl::StatusOr<FileTensors> ReadTorchArchive(const std::string& path) {
  ASSIGN_OR_RETURN(const auto file, RegularFile::Open(path));
  RETURN_IF_ERROR(CheckIsZip(*file));
  ASSIGN_OR_RETURN(const ZipDirectory entries, ReadZipDirectory(*file));
  ASSIGN_OR_RETURN(const std::string folder, FindFolder(*file, entries));
  RETURN_IF_ERROR(CheckByteOrder(*file, entries, folder));
  const ZipEntry& entry = entries.at(folder + "data.pkl");
  if (entry.bytes > kMaxPickleBytes) {
    return Refuse(*file, absl::StrCat("a pickle of ", entry.bytes, " bytes; the limit is ", kMaxPickleBytes));
  }
  ASSIGN_OR_RETURN(const std::string pickle, file->ReadString(entry.offset, entry.bytes));
  const absl::StatusOr<std::vector<PickledTensor>> pickled = ReadTorchPickle(pickle);
  if (!pickled.ok()) return Refuse(*file, pickled.status().message());
  FileTensors contents;
  for (const PickledTensor& tensor : *pickled) {
    if (!tensor.dtype) {
      contents.foreign.emplace(tensor.name, ForeignTensor{tensor.type, path});
      continue;
    }
    absl::StatusOr<StoredTensor> stored = Resolve(tensor, entries, folder);
    if (!stored.ok()) {
      return Refuse(*file, absl::StrCat("tensor ", Quoted(tensor.name), " ", stored.status().message()));
    }
    stored->file = file;
    contents.tensors.emplace(tensor.name, *std::move(stored));
  }
  return contents;
}

}  // namespace dejavu
