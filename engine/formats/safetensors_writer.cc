#include "engine/formats/safetensors_writer.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "kernels/base/float16.h"
#include "kernels/base/round.h"

namespace dejavu {

std::string SafetensorsHeader(std::string json, int64_t alignment) {
  constexpr size_t kLengthBytes = 8;
  json.resize(RoundUp(kLengthBytes + json.size(), alignment) - kLengthBytes, ' ');
  std::string length(kLengthBytes, '\0');
  for (size_t i = 0; i < kLengthBytes; ++i) length[i] = static_cast<char>(uint64_t{json.size()} >> (8 * i));
  return length + json;
}

void SafetensorsWriter::AddBytes(const std::string& name, const char* dtype, const std::vector<int64_t>& shape,
                                 const void* data, size_t bytes) {
  header_[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {data_.size(), data_.size() + bytes}}};
  data_.append(static_cast<const char*>(data), bytes);
}

void SafetensorsWriter::Add(const std::string& name, const std::vector<int64_t>& shape,
                            const std::vector<float>& values) {
  AddBytes(name, "F32", shape, values.data(), values.size() * sizeof(float));
}

void SafetensorsWriter::Add(const std::string& name, const std::vector<int64_t>& shape,
                            const std::vector<int8_t>& values) {
  AddBytes(name, "I8", shape, values.data(), values.size());
}

void SafetensorsWriter::AddAsFloat16(const std::string& name, const std::vector<int64_t>& shape,
                                     const std::vector<float>& values) {
  std::vector<uint16_t> bits(values.size());
  std::transform(values.begin(), values.end(), bits.begin(), Float16FromFloat);
  AddBytes(name, "F16", shape, bits.data(), bits.size() * sizeof(uint16_t));
}

absl::Status SafetensorsWriter::Write(const std::string& metadata_key, const std::string& metadata,
                                      const std::string& path) {
  header_["__metadata__"] = {{metadata_key, metadata}};
  const std::string temporary = absl::StrCat(path, ".", getpid(), ".tmp");
  std::ofstream file(temporary, std::ios::binary);
  file << SafetensorsHeader(header_.dump()) << data_;
  file.close();
  if (file && std::rename(temporary.c_str(), path.c_str()) == 0) return absl::OkStatus();
  const std::string reason = std::strerror(errno);
  std::remove(temporary.c_str());
  return absl::UnavailableError(absl::StrCat(path, ": cannot be written: ", reason));
}

}  // namespace dejavu
