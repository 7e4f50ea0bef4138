// Builds small checkpoint files byte by byte, so that tests can damage them precisely. One thread.
#ifndef TESTS_ENGINE_FORMATS_CHECKPOINT_FILES_H_
#define TESTS_ENGINE_FORMATS_CHECKPOINT_FILES_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/formats/checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {

inline std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// Not OK, with every one of `parts` in the message.
template <typename T>
void ExpectRefused(const absl::StatusOr<T>& result, const std::vector<std::string>& parts) {
  ASSERT_FALSE(result.ok()) << "expected: " << testing::PrintToString(parts);
  for (const std::string& part : parts) EXPECT_THAT(std::string(result.status().message()), testing::HasSubstr(part));
}

// A damaged file may be refused; what is accepted must lie within the file.
inline void ExpectReadableIfAccepted(const absl::StatusOr<TensorMap>& tensors) {
  if (!tensors.ok()) return;
  for (const auto& [name, tensor] : *tensors) {
    std::string data(tensor.elements * SizeOf(tensor.dtype), '\0');
    EXPECT_TRUE(Checkpoint::Read(tensor, 0, tensor.elements, data.data()).ok());
  }
}

// `value` in `width` bytes, little-endian.
inline std::string Little(uint64_t value, int width) {
  std::string bytes;
  for (int i = 0; i < width; ++i) bytes.push_back(static_cast<char>(i < 8 ? value >> (8 * i) : 0));
  return bytes;
}

inline std::string Patched(std::string bytes, size_t offset, uint64_t value, int width) {
  return bytes.replace(offset, width, Little(value, width));
}

inline std::string Safetensors(const std::string& header, const std::string& data) {
  return Little(header.size(), 8) + header + data;
}

// Pickle, protocol 2.
inline std::string PickledString(const std::string& text) { return "X" + Little(text.size(), 4) + text; }
inline std::string PickledInt(int64_t value) { return "\x8a\x08" + Little(static_cast<uint64_t>(value), 8); }
inline std::string PickledGlobal(const std::string& module, const std::string& name) {
  return "c" + module + "\n" + name + "\n";
}
inline std::string PickledTuple(const std::vector<int64_t>& values) {
  std::string bytes = "(";
  for (const int64_t value : values) bytes += PickledInt(value);
  return bytes + "t";
}
inline std::string PickledStorage(const std::string& type, const std::string& key, int64_t elements) {
  return "(" + PickledString("storage") + PickledGlobal("torch", type) + PickledString(key) + PickledString("cpu") +
         PickledInt(elements) + "tQ";
}
inline std::string PickledTensor(const std::string& storage, int64_t offset, const std::vector<int64_t>& shape,
                                 const std::vector<int64_t>& strides) {
  return PickledGlobal("torch._utils", "_rebuild_tensor_v2") + "(" + storage + PickledInt(offset) +
         PickledTuple(shape) + PickledTuple(strides) + "\x89" + PickledGlobal("collections", "OrderedDict") + ")RtR";
}
// A dictionary of pickled values.
inline std::string PickledDict(const std::vector<std::pair<std::string, std::string>>& entries) {
  std::string bytes = "\x80\x02}(";
  for (const auto& [name, value] : entries) bytes += PickledString(name) + value;
  return bytes + "u.";
}

// A zip archive that stores, with sizes in the central directory only, as torch writes it.
class ZipFile {
 public:
  ZipFile& Add(const std::string& name, const std::string& data) {
    locals_.push_back(bytes_.size());
    centrals_.push_back(central_.size());
    central_ += "PK\x01\x02" + Little(0, 4) + Little(0x0808, 2) + Little(0, 10) + Little(data.size(), 4) +
                Little(data.size(), 4) + Little(name.size(), 2) + Little(0, 12) + Little(bytes_.size(), 4) + name;
    bytes_ += "PK\x03\x04" + Little(0, 2) + Little(0x0808, 2) + Little(0, 18) + Little(name.size(), 2) + Little(0, 2) +
              name + data;
    return *this;
  }

  std::string Bytes() const {
    return bytes_ + central_ + "PK\x05\x06" + Little(0, 4) + Little(locals_.size(), 2) + Little(locals_.size(), 2) +
           Little(central_.size(), 4) + Little(bytes_.size(), 4) + Little(0, 2);
  }
  // With all sizes and offsets of the end record moved to the zip64 end record.
  std::string Zip64Bytes() const {
    return bytes_ + central_ + "PK\x06\x06" + Little(44, 8) + Little(0, 12) + Little(locals_.size(), 8) +
           Little(locals_.size(), 8) + Little(central_.size(), 8) + Little(bytes_.size(), 8) + "PK\x06\x07" +
           Little(0, 4) + Little(bytes_.size() + central_.size(), 8) + Little(1, 4) + "PK\x05\x06" + Little(0, 4) +
           Little(0xffff, 2) + Little(0xffff, 2) + Little(0xffffffff, 4) + Little(0xffffffff, 4) + Little(0, 2);
  }

  // Offsets in the file.
  size_t local(int entry) const { return locals_[entry]; }
  size_t central(int entry) const { return bytes_.size() + centrals_[entry]; }
  size_t end() const { return bytes_.size() + central_.size(); }

 private:
  std::string bytes_;
  std::string central_;
  std::vector<size_t> locals_;
  std::vector<size_t> centrals_;
};

}  // namespace dejavu

#endif  // TESTS_ENGINE_FORMATS_CHECKPOINT_FILES_H_
