// SafetensorsWriter: collects tensors and writes them as one safetensors file (engine/formats/safetensors.cc tells the
// format). One thread.
#ifndef ENGINE_FORMATS_SAFETENSORS_WRITER_H_
#define ENGINE_FORMATS_SAFETENSORS_WRITER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "nlohmann/json.hpp"

namespace dejavu {

// What a file begins with: the length of the header and the header, which ends so that the data begins at a multiple of
// `alignment` bytes.
std::string SafetensorsHeader(std::string json, int64_t alignment = 8);

class SafetensorsWriter {
 public:
  void Add(const std::string& name, const std::vector<int64_t>& shape, const std::vector<float>& values);
  void Add(const std::string& name, const std::vector<int64_t>& shape, const std::vector<int8_t>& values);
  // Rounded to the nearest.
  void AddAsFloat16(const std::string& name, const std::vector<int64_t>& shape, const std::vector<float>& values);

  // With one entry of metadata. Written beside `path` first and then renamed; UNAVAILABLE with the reason.
  absl::Status Write(const std::string& metadata_key, const std::string& metadata, const std::string& path);

 private:
  void AddBytes(const std::string& name, const char* dtype, const std::vector<int64_t>& shape, const void* data,
                size_t bytes);

  nlohmann::json header_ = nlohmann::json::object();
  std::string data_;
};

}  // namespace dejavu

#endif  // ENGINE_FORMATS_SAFETENSORS_WRITER_H_
