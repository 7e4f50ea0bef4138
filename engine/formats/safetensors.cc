// A safetensors file: the length of a header as 8 bytes (little-endian), the header, which is JSON, and the data.
//   {"__metadata__": {...}, "name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
// with offsets that count from the start of the data.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "engine/formats/json_text.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int64_t kMaxHeaderBytes = int64_t{100} << 20;  // as in the reference implementation
constexpr int64_t kLengthBytes = 8;

struct Extent {
  int64_t begin = 0;
  int64_t end = 0;
  std::string name;
};

// Non-negative integers only: not negative ones, not floats, not those beyond int64.
std::optional<std::vector<int64_t>> Integers(const nlohmann::json& entry, const char* key) {
  const auto found = entry.find(key);
  if (found == entry.end() || !found->is_array()) return std::nullopt;
  std::vector<int64_t> values;
  for (const nlohmann::json& value : *found) {
    if (!value.is_number_unsigned() || value.get<uint64_t>() > INT64_MAX) return std::nullopt;
    values.push_back(static_cast<int64_t>(value.get<uint64_t>()));
  }
  return values;
}

std::optional<DType> KnownType(absl::string_view name) {
  if (name == "F32") return DType::kFloat32;
  if (name == "F16") return DType::kFloat16;
  if (name == "BF16") return DType::kBFloat16;
  if (name == "I8") return DType::kInt8;
  return std::nullopt;
}

// The data that an entry claims, in bytes from the start of the data.
absl::StatusOr<Extent> ReadExtent(const std::string& name, const nlohmann::json& entry, int64_t data_bytes) {
  const auto offsets = Integers(entry, "data_offsets");
  if (!offsets || offsets->size() != 2) {
    return absl::InvalidArgumentError("has no \"data_offsets\" of two non-negative integers");
  }
  const Extent extent{(*offsets)[0], (*offsets)[1], name};
  if (extent.begin > extent.end || extent.end > data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("claims bytes ", extent.begin, " to ", extent.end, " of the data; the file has ", data_bytes));
  }
  return extent;
}

// Nothing for a tensor of another type.
absl::StatusOr<std::optional<StoredTensor>> ReadTensor(const nlohmann::json& entry, const Extent& extent) {
  const auto dtype = entry.find("dtype");
  if (dtype == entry.end() || !dtype->is_string()) return absl::InvalidArgumentError("has no string \"dtype\"");
  const auto shape = Integers(entry, "shape");
  if (!shape) return absl::InvalidArgumentError("has no \"shape\" of non-negative integers");
  ASSIGN_OR_RETURN(const int64_t elements, ElementCount(*shape));
  const std::optional<DType> type = KnownType(dtype->get_ref<const std::string&>());
  if (!type) return std::optional<StoredTensor>();
  const int64_t bytes = elements * SizeOf(*type);
  if (bytes != extent.end - extent.begin) {
    return absl::InvalidArgumentError(
        absl::StrCat("needs ", bytes, " bytes for its shape and has ", extent.end - extent.begin));
  }
  StoredTensor tensor;
  tensor.name = extent.name;
  tensor.dtype = *type;
  tensor.shape = *shape;
  tensor.elements = elements;
  tensor.offset = extent.begin;
  return tensor;
}

absl::Status RefuseOverlaps(std::vector<Extent> extents, const std::string& path) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin >= extents[i - 1].end) continue;
    return absl::InvalidArgumentError(absl::StrCat(path, ": the data of tensors ", Quoted(extents[i - 1].name), " and ",
                                                   Quoted(extents[i].name), " overlap"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadHeader(const RegularFile& file) {
  if (file.size() < kLengthBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.path(), ": ", file.size(), " bytes are too few for a safetensors file"));
  }
  uint8_t raw[kLengthBytes];
  RETURN_IF_ERROR(file.Read(0, kLengthBytes, raw));
  uint64_t length = 0;
  for (int i = kLengthBytes - 1; i >= 0; --i) length = length << 8 | raw[i];
  const int64_t limit = std::min(kMaxHeaderBytes, file.size() - kLengthBytes);
  if (length > static_cast<uint64_t>(limit)) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.path(), ": claims a header of ", length, " bytes; the limit here is ", limit));
  }
  return file.ReadString(kLengthBytes, static_cast<int64_t>(length));
}

}  // namespace

absl::StatusOr<TensorMap> ReadSafetensorsHeader(const std::string& path, const std::string& metadata_key,
                                                std::string* metadata) {
  ASSIGN_OR_RETURN(const auto file, RegularFile::Open(path));
  ASSIGN_OR_RETURN(const std::string text, ReadHeader(*file));
  ASSIGN_OR_RETURN(const nlohmann::json header, ParseJsonObject(text, path));
  const int64_t data_start = kLengthBytes + static_cast<int64_t>(text.size());
  TensorMap tensors;
  std::vector<Extent> extents;
  for (const auto& item : header.items()) {
    const std::string& name = item.key();
    const nlohmann::json& entry = item.value();
    if (name == "__metadata__") {
      if (metadata != nullptr && entry.is_object() && entry.contains(metadata_key) && entry[metadata_key].is_string()) {
        *metadata = entry[metadata_key].get<std::string>();
      }
      continue;
    }
    const auto refuse = [&](absl::string_view reason) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": tensor ", Quoted(name), " ", reason));
    };
    if (!entry.is_object()) return refuse("is not described by an object");
    absl::StatusOr<Extent> extent = ReadExtent(name, entry, file->size() - data_start);
    if (!extent.ok()) return refuse(extent.status().message());
    absl::StatusOr<std::optional<StoredTensor>> tensor = ReadTensor(entry, *extent);
    if (!tensor.ok()) return refuse(tensor.status().message());
    if (extent->begin < extent->end) extents.push_back(*std::move(extent));
    if (!tensor->has_value()) continue;
    (*tensor)->file = file;
    (*tensor)->offset += data_start;
    tensors.emplace(name, **std::move(tensor));
  }
  RETURN_IF_ERROR(RefuseOverlaps(std::move(extents), path));
  return tensors;
}

}  // namespace dejavu
