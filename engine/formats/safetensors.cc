// A safetensors file: the length of a header as 8 bytes (little-endian), the header, which is JSON, and the data.
//   {"__metadata__": {...}, "name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
// with offsets that count from the start of the data. As the reference implementation has it, every byte of the data
// belongs to exactly one tensor.
#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/formats/checkpoint.h"
#include "engine/formats/json_text.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // as in the reference implementation
constexpr int64_t kLengthBytes = 8;
constexpr char kMetadata[] = "__metadata__";

struct StoredType {
  absl::string_view name;
  int bits;
  std::optional<DType> dtype;  // nothing: foreign
};

constexpr StoredType kStoredTypes[] = {
    {"F32", 32, DType::kFloat32},
    {"F16", 16, DType::kFloat16},
    {"BF16", 16, DType::kBFloat16},
    {"I8", 8, DType::kInt8},
    {"F64", 64, {}},
    {"I64", 64, {}},
    {"U64", 64, {}},
    {"C64", 64, {}},
    {"I32", 32, {}},
    {"U32", 32, {}},
    {"I16", 16, {}},
    {"U16", 16, {}},
    {"U8", 8, {}},
    {"BOOL", 8, {}},
    {"F8_E4M3", 8, {}},
    {"F8_E5M2", 8, {}},
    {"F8_E8M0", 8, {}},
    {"F8_E4M3FNUZ", 8, {}},
    {"F8_E5M2FNUZ", 8, {}},
    {"F6_E2M3", 6, {}},
    {"F6_E3M2", 6, {}},
    {"F4", 4, {}},
};

// A tensor as the header describes it; its bytes count from the start of the data.
struct Entry {
  std::string name;
  const StoredType* type = nullptr;
  std::vector<int64_t> shape;
  int64_t elements = 0;
  int64_t begin = 0;
  int64_t end = 0;
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

absl::StatusOr<const StoredType*> TypeOf(const nlohmann::json& entry) {
  const auto dtype = entry.find("dtype");
  if (dtype == entry.end() || !dtype->is_string()) return absl::InvalidArgumentError("has no string \"dtype\"");
  const auto& name = dtype->get_ref<const std::string&>();
  for (const StoredType& type : kStoredTypes) {
    if (type.name == name) return &type;
  }
  return absl::InvalidArgumentError(absl::StrCat("has dtype ", Quoted(name), ", which safetensors does not know"));
}

// It lies in the data, and has the bytes that its type and shape need.
absl::Status CheckExtent(const Entry& entry, int64_t data_bytes) {
  if (entry.begin > entry.end || entry.end > data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("claims bytes ", entry.begin, " to ", entry.end, " of the data; the file has ", data_bytes));
  }
  int64_t bits = 0;
  if (__builtin_mul_overflow(entry.elements, entry.type->bits, &bits) || bits % 8 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("has ", entry.elements, " elements of ", entry.type->bits, " bits, which are no bytes"));
  }
  if (bits / 8 != entry.end - entry.begin) {
    return absl::InvalidArgumentError(
        absl::StrCat("needs ", bits / 8, " bytes for its shape and has ", entry.end - entry.begin));
  }
  return absl::OkStatus();
}

absl::StatusOr<Entry> ReadEntry(const std::string& name, const nlohmann::json& json, int64_t data_bytes) {
  if (!json.is_object()) return absl::InvalidArgumentError("is not described by an object");
  Entry entry;
  entry.name = name;
  ASSIGN_OR_RETURN(entry.type, TypeOf(json));
  auto shape = Integers(json, "shape");
  if (!shape) return absl::InvalidArgumentError("has no \"shape\" of non-negative integers");
  ASSIGN_OR_RETURN(entry.elements, ElementCount(*shape));
  entry.shape = *std::move(shape);
  const auto offsets = Integers(json, "data_offsets");
  if (!offsets || offsets->size() != 2) {
    return absl::InvalidArgumentError("has no \"data_offsets\" of two non-negative integers");
  }
  entry.begin = (*offsets)[0];
  entry.end = (*offsets)[1];
  RETURN_IF_ERROR(CheckExtent(entry, data_bytes));
  return entry;
}

// `entries`, in the order of their bytes, cover the data from its first byte to its last, each byte once.
absl::Status CheckCover(const std::vector<Entry>& entries, int64_t data_bytes, const std::string& path) {
  int64_t covered = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != covered) {
      const std::string why = entry.begin < covered
                                  ? absl::StrCat("which overlaps the tensor that ends at byte ", covered)
                                  : absl::StrCat("and bytes ", covered, " to ", entry.begin, " belong to no tensor");
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor ", Quoted(entry.name), " begins at byte ", entry.begin, " of the data, ", why));
    }
    covered = entry.end;
  }
  if (covered == data_bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(path, ": ", data_bytes - covered, " bytes at the end belong to no tensor"));
}

absl::Status ReadMetadata(const nlohmann::json& metadata, const std::string& path, FileTensors* file) {
  if (metadata.is_null()) return absl::OkStatus();
  if (!metadata.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", kMetadata, " is ", metadata.type_name(), ", no object"));
  }
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": ", kMetadata, " ", Quoted(key), " is ", value.type_name(), ", no string"));
    }
    file->metadata.emplace(key, value.get<std::string>());
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

std::string SafetensorsName(DType dtype) {
  const auto* type = std::find_if(std::begin(kStoredTypes), std::end(kStoredTypes),
                                  [&](const StoredType& t) { return t.dtype == dtype; });
  CHECK(type != std::end(kStoredTypes)) << "weights of type " << Name(dtype);
  return std::string(type->name);
}

absl::StatusOr<FileTensors> ReadSafetensorsHeader(const std::string& path) {
  ASSIGN_OR_RETURN(const auto file, RegularFile::Open(path));
  ASSIGN_OR_RETURN(const std::string text, ReadHeader(*file));
  ASSIGN_OR_RETURN(const nlohmann::json header, ParseJsonObject(text, path));
  const int64_t data_start = kLengthBytes + static_cast<int64_t>(text.size());
  const int64_t data_bytes = file->size() - data_start;
  FileTensors contents;
  std::vector<Entry> entries;
  for (const auto& [name, json] : header.items()) {
    if (name == kMetadata) {
      RETURN_IF_ERROR(ReadMetadata(json, path, &contents));
      continue;
    }
    absl::StatusOr<Entry> entry = ReadEntry(name, json, data_bytes);
    if (!entry.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": tensor ", Quoted(name), " ", entry.status().message()));
    }
    entries.push_back(*std::move(entry));
  }
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  RETURN_IF_ERROR(CheckCover(entries, data_bytes, path));
  for (Entry& entry : entries) {
    const StoredType& type = *entry.type;
    if (type.dtype.has_value()) {
      contents.tensors.emplace(entry.name, StoredTensor{entry.name, *type.dtype, std::move(entry.shape), entry.elements,
                                                        file, data_start + entry.begin});
    } else {
      contents.foreign.emplace(entry.name, ForeignTensor{std::string(type.name), path});
    }
  }
  return contents;
}

}  // namespace dejavu
