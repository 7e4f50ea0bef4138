#include "tests/engine/golden.h"

#include <cstring>
#include <fstream>
#include <sstream>

#include "kernels/base/check.h"
#include "nlohmann/json.hpp"

namespace dejavu {
namespace {

class GoldenFile {
 public:
  explicit GoldenFile(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    CHECK(in.good()) << path;
    std::stringstream content;
    content << in.rdbuf();
    bytes_ = content.str();
    uint64_t header_bytes;
    std::memcpy(&header_bytes, bytes_.data(), sizeof header_bytes);
    header_ = nlohmann::json::parse(bytes_.substr(8, header_bytes));
    data_ = 8 + header_bytes;
  }

  bool Has(const std::string& name) const { return header_.contains(name); }

  template <typename Stored, typename T>
  std::vector<T> Read(const std::string& name) const {
    const size_t begin = header_[name]["data_offsets"][0], end = header_[name]["data_offsets"][1];
    std::vector<Stored> stored((end - begin) / sizeof(Stored));
    std::memcpy(stored.data(), bytes_.data() + data_ + begin, end - begin);
    return std::vector<T>(stored.begin(), stored.end());
  }

 private:
  std::string bytes_;
  nlohmann::json header_;
  size_t data_;
};

}  // namespace

std::vector<std::string> GoldenCheckpoints() {
  return {"pre-norm-hd64",   "pre-norm-hd80",       "pre-norm-hd128-sharded",
          "odd-ffn-float32", "post-norm-350m-form", "old-key-prefix"};
}

std::string CheckpointPath(const std::string& name) { return std::string(TESTDATA) + "/opt/" + name; }

std::vector<Golden> LoadGoldens(const std::string& name) {
  const GoldenFile file(CheckpointPath(name) + "/golden.safetensors");
  std::vector<Golden> goldens;
  for (int k = 0; file.Has("prompt." + std::to_string(k)); ++k) {
    const std::string suffix = "." + std::to_string(k);
    goldens.push_back({file.Read<int64_t, int32_t>("prompt" + suffix), file.Read<float, float>("logits" + suffix),
                       file.Read<int64_t, int32_t>("greedy" + suffix), file.Read<float, float>("margin" + suffix)});
  }
  CHECK(goldens.size() == 3) << name;
  return goldens;
}

}  // namespace dejavu
