#include "engine/model/weights_hash.h"

#include <cmath>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/base/float16.h"
#include "nlohmann/json.hpp"
#include "tests/engine/formats/checkpoint_files.h"
#include "tests/engine/tiny_checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

std::string HashOf(const std::string& directory) {
  const auto config = OptConfig::Load(directory);
  const auto checkpoint = Checkpoint::Open(directory);
  EXPECT_TRUE(config.ok() && checkpoint.ok()) << directory;
  const auto hash = WeightsHash(*checkpoint, *config);
  EXPECT_TRUE(hash.ok()) << hash.status();
  return *hash;
}

std::string HashOf(const TinyCheckpoint& tiny) {
  const ScratchDirectory directory;
  tiny.Write(directory);
  return HashOf(directory.path());
}

// With values that float16 can hold.
TinyCheckpoint HalfPrecise(uint32_t seed) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(seed);
  for (auto& [name, values] : tiny.tensors) {
    for (float& x : values.data) x = FloatFromFloat16(Float16FromFloat(x));
  }
  return tiny;
}

std::string Float16Bytes(const std::vector<float>& values) {
  std::string bytes;
  for (const float x : values) bytes += Little(Float16FromFloat(x), 2);
  return bytes;
}

void WriteFloat16Safetensors(const TinyCheckpoint& tiny, const ScratchDirectory& directory) {
  nlohmann::json header;
  std::string data;
  for (const auto& [name, values] : tiny.tensors) {
    const size_t begin = data.size();
    data += Float16Bytes(values.data);
    header[name] = {{"dtype", "F16"}, {"shape", values.shape}, {"data_offsets", {begin, data.size()}}};
  }
  directory.Write("config.json", tiny.config.dump());
  directory.Write("model.safetensors", Safetensors(header.dump(), data));
}

void WriteTorchArchive(const TinyCheckpoint& tiny, const std::string& type, const ScratchDirectory& directory) {
  ZipFile zip;
  std::vector<std::pair<std::string, std::string>> entries;
  for (const auto& [name, values] : tiny.tensors) {
    const std::string key = std::to_string(entries.size());
    const auto elements = static_cast<int64_t>(values.data.size());
    std::vector<int64_t> strides(values.shape.size(), 1);
    if (strides.size() == 2) strides[0] = values.shape[1];
    entries.emplace_back(name, PickledTensor(PickledStorage(type, key, elements), 0, values.shape, strides));
    zip.Add("archive/data/" + key,
            type == "HalfStorage"
                ? Float16Bytes(values.data)
                : std::string(reinterpret_cast<const char*>(values.data.data()), elements * sizeof(float)));
  }
  zip.Add("archive/data.pkl", PickledDict(entries));
  directory.Write("config.json", tiny.config.dump());
  directory.Write("pytorch_model.bin", zip.Bytes());
}

TEST(WeightsHash, IsTheSameForEveryFormOfTheSameWeights) {
  const TinyCheckpoint tiny = HalfPrecise(1);
  const std::string expected = HashOf(tiny);
  EXPECT_EQ(expected.size(), std::string("sha256:").size() + 64);
  const ScratchDirectory half, bin, half_bin;
  WriteFloat16Safetensors(tiny, half);
  WriteTorchArchive(tiny, "FloatStorage", bin);
  WriteTorchArchive(tiny, "HalfStorage", half_bin);
  EXPECT_EQ(HashOf(half.path()), expected);
  EXPECT_EQ(HashOf(bin.path()), expected);
  EXPECT_EQ(HashOf(half_bin.path()), expected);
  TinyCheckpoint renamed = tiny;  // old checkpoints have names without "model."
  renamed.tensors.clear();
  for (const auto& [name, values] : tiny.tensors) renamed.tensors[name.substr(std::string("model.").size())] = values;
  EXPECT_EQ(HashOf(renamed), expected);
}

TEST(WeightsHash, DiffersForAnotherModelAndForOtherRowsOfAMatrix) {
  const TinyCheckpoint whole = HalfPrecise(1);
  std::set<std::string> hashes = {HashOf(whole)};
  EXPECT_TRUE(hashes.insert(HashOf(HalfPrecise(2))).second);
  for (const char* name : {"embed_tokens", "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj",
                           "layers.0.self_attn.out_proj", "layers.1.fc1", "layers.0.fc2"}) {
    const std::string tensor = absl::StrCat("model.decoder.", name, ".weight");
    const auto& shape = whole.tensors.at(tensor).shape;
    for (const int64_t row : {int64_t{0}, (shape[0] - 1) / 2, shape[0] - 1}) {
      TinyCheckpoint other = whole;
      float& value = other.tensors.at(tensor).data[row * shape[1] + shape[1] - 1];
      value = std::nextafter(value, 1.0f);
      EXPECT_TRUE(hashes.insert(HashOf(other)).second) << tensor << ", row " << row;
    }
  }
  TinyCheckpoint heads = whole;  // the same weights, used in another way
  heads.config["num_attention_heads"] = 4;
  EXPECT_TRUE(hashes.insert(HashOf(heads)).second);
  for (const char* name : {"pre-norm-hd64", "post-norm-350m-form", "odd-ffn-float32", "pre-norm-hd128-sharded"}) {
    EXPECT_TRUE(hashes.insert(HashOf(absl::StrCat(TESTDATA, "/opt/", name))).second) << name;
  }
}

}  // namespace
}  // namespace dejavu
