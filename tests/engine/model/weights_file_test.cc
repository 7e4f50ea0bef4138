// Weights in a file as they lie in memory. What ranks load of it, of every form of the model and every type, is held
// against the whole model in sharded_model_test.cc.
#include "engine/model/weights_file.h"

#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gtest/gtest.h"
#include "tests/engine/cpu.h"
#include "tests/engine/formats/checkpoint_files.h"
#include "tests/engine/tiny_checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

// A small model, in int8 unless said otherwise, as a checkpoint and converted.
class WeightsFiles : public testing::Test {
 protected:
  void Convert(const TinyCheckpoint& tiny, std::optional<DType> dtype = DType::kInt8) {
    tiny.Write(directory_);
    config_ = *OptConfig::Load(directory_.path());
    OptWeights weights =
        *OptWeights::Load(*Checkpoint::Open(directory_.path()), config_, Shard::Whole(config_), Cpu(), nullptr, dtype);
    ASSERT_TRUE(WeightsFile::Write(weights, config_, "the hash", path_, nullptr).ok());
    memory_.assign(static_cast<const char*>(weights.memory().data), weights.bytes());
  }

  absl::StatusOr<std::optional<WeightsFile>> Open() const { return WeightsFile::Open(directory_.path(), config_); }

  absl::StatusOr<OptWeights> Load(const WeightsFile& file, std::optional<DType> dtype = std::nullopt,
                                  const LoadProgress& progress = nullptr) const {
    return file.Load(Shard::Whole(config_), Cpu(), progress, dtype);
  }

  const ScratchDirectory directory_;
  const std::string path_ = directory_.Path(WeightsFile::kName);
  OptConfig config_;
  std::string memory_;
};

// Whether `data` lies in a mapping of that file.
bool IsMapped(const void* data, const std::string& path) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    uintptr_t from = 0, to = 0;
    if (line.size() < path.size() || line.substr(line.size() - path.size()) != path) continue;
    if (std::sscanf(line.c_str(), "%lx-%lx", &from, &to) == 2 && from <= address && address < to) return true;
  }
  return false;
}

TEST_F(WeightsFiles, ACopyIsMemoryOfItsOwn) {
  Convert(TinyCheckpoint::Random(1));
  const OptWeights weights = *(*Open())->Load(Shard::Whole(config_), Cpu(), nullptr, std::nullopt, /*map=*/false);
  EXPECT_FALSE(IsMapped(weights.layers[1].mlp.down.weight.data, path_));
  EXPECT_EQ(std::string(static_cast<const char*>(weights.memory().data), weights.bytes()), memory_);
}

TEST_F(WeightsFiles, TheMappedFileIsTheWeights) {
  Convert(TinyCheckpoint::Random(1));
  const std::optional<WeightsFile> file = *Open();
  ASSERT_TRUE(file.has_value());
  EXPECT_EQ(file->weights_hash(), "the hash");
  EXPECT_EQ(file->dtype(), DType::kInt8);
  EXPECT_EQ(file->position_dtype(), DType::kFloat32);
  int64_t told = 0, total = 0;
  const OptWeights weights = *Load(*file, std::nullopt, [&](int64_t done, int64_t all) {
    told = done;
    total = all;
    return true;
  });
  EXPECT_TRUE(IsMapped(weights.layers[1].mlp.down.weight.data, path_));
  EXPECT_EQ(std::string(static_cast<const char*>(weights.memory().data), weights.bytes()), memory_);
  EXPECT_EQ(total, weights.bytes());
  EXPECT_EQ(told, total);
  // Another file of the same name changes nothing for who has this one.
  std::filesystem::remove(path_);
  EXPECT_EQ(std::string(static_cast<const char*>(weights.memory().data), weights.bytes()), memory_);
}

TEST_F(WeightsFiles, IsASafetensorsFileWithAlignedData) {
  Convert(TinyCheckpoint::Random(1));
  const auto contents = ReadSafetensorsHeader(path_);
  ASSERT_TRUE(contents.ok()) << contents.status();
  EXPECT_EQ(contents->metadata.at("weights"), "int8");
  const StoredTensor& first = contents->tensors.at("token_embedding.weight");
  EXPECT_EQ(first.offset % 4096, 0);
  EXPECT_EQ(contents->tensors.at("layers.0.down.scale").shape, std::vector<int64_t>{40});
}

TEST_F(WeightsFiles, WithoutOneThereIsNothing) {
  TinyCheckpoint::Random(1).Write(directory_);
  config_ = *OptConfig::Load(directory_.path());
  const auto none = Open();
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_FALSE(none->has_value());
  std::filesystem::create_symlink(directory_.Path("nowhere"), path_);
  ExpectRefused(Open(), {path_});
}

TEST_F(WeightsFiles, EveryDamageToTheHeaderIsRefusedByName) {
  Convert(TinyCheckpoint::Random(1));
  const std::string bytes = ReadAll(path_);
  const int64_t data_start = ReadSafetensorsHeader(path_)->tensors.at("token_embedding.weight").offset;
  ASSERT_GT(data_start, 4000);
  for (int64_t i = 0; i < data_start; i += 5) {
    std::string damaged = bytes;
    damaged[i] = static_cast<char>(damaged[i] ^ 1);
    directory_.Write(WeightsFile::kName, damaged);
    SCOPED_TRACE(testing::Message() << "byte " << i);
    ExpectRefused(Open(), {path_});
  }
}

TEST_F(WeightsFiles, OfAnotherLengthItIsRefusedByName) {
  Convert(TinyCheckpoint::Random(1));
  const std::string bytes = ReadAll(path_);
  for (const size_t length : {size_t{0}, size_t{7}, size_t{100}, size_t{5000}, bytes.size() / 2, bytes.size() - 1}) {
    directory_.Write(WeightsFile::kName, bytes.substr(0, length));
    ExpectRefused(Open(), {path_});
  }
  directory_.Write(WeightsFile::kName, bytes + "x");
  ExpectRefused(Open(), {path_, "belong to no tensor"});
}

TEST_F(WeightsFiles, CutShortAfterItWasOpenedItIsRefusedByName) {
  Convert(TinyCheckpoint::Random(1, 64));
  const std::optional<WeightsFile> file = *Open();
  std::filesystem::resize_file(path_, std::filesystem::file_size(path_) / 2);
  ExpectRefused(Load(*file), {path_, "cannot read"});
}

TEST_F(WeightsFiles, OfAnotherModelOrVersionItIsRefused) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(1);
  Convert(tiny);
  const std::string bytes = ReadAll(path_);
  tiny.config["num_attention_heads"] = 4;  // the same shapes
  tiny.Write(directory_);
  config_ = *OptConfig::Load(directory_.path());
  ExpectRefused(Open(), {path_, "heads 2", "config.json says", "heads 4"});
  directory_.Write(WeightsFile::kName, absl::StrReplaceAll(bytes, {{"\"version\":\"1\"", "\"version\":\"2\""}}));
  ExpectRefused(Open(), {path_, "layout version \"2\"", "convert the model again"});
  std::filesystem::copy(directory_.Path("model.safetensors"), path_, std::filesystem::copy_options::overwrite_existing);
  ExpectRefused(Open(), {path_, "is no file of dejavu-convert"});
}

TEST_F(WeightsFiles, NothingIsConvertedTwice) {
  for (const DType held : {DType::kInt8, DType::kBFloat16}) {
    Convert(TinyCheckpoint::Random(1).Untie(2), held);
    const std::optional<WeightsFile> file = *Open();
    EXPECT_TRUE(file->has_own_head());
    EXPECT_TRUE(Load(*file, held).ok());
    for (const DType wanted : {DType::kInt8, DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
      if (wanted == held) continue;
      ExpectRefused(Load(*file, wanted), {path_, Name(held), Name(wanted), "checkpoint"});
      ExpectRefused(file->Measure(Shard::Whole(config_), wanted), {path_});
    }
  }
}

TEST_F(WeightsFiles, ALoadCanBeStopped) {
  Convert(TinyCheckpoint::Random(1));
  const std::optional<WeightsFile> file = *Open();
  const auto stop = [](int64_t, int64_t) { return false; };
  EXPECT_TRUE(absl::IsCancelled(Load(*file, std::nullopt, stop).status()));
  const Shard half = *MakeShard(config_, nullptr, 0, 2);
  EXPECT_TRUE(absl::IsCancelled(file->Load(half, Cpu(), stop, std::nullopt).status()));
  OptWeights weights = *Load(*file);
  EXPECT_TRUE(absl::IsCancelled(WeightsFile::Write(weights, config_, "", directory_.Path("other"), stop)));
}

TEST_F(WeightsFiles, WhatCannotBeWrittenIsSaid) {
  Convert(TinyCheckpoint::Random(1));
  OptWeights weights = *Load(**Open());
  const absl::Status full = WeightsFile::Write(weights, config_, "", "/dev/full", nullptr);
  EXPECT_THAT(std::string(full.message()), testing::HasSubstr("/dev/full: cannot be written: No space left on device"));
  const absl::Status nowhere = WeightsFile::Write(weights, config_, "", directory_.Path("no/where"), nullptr);
  EXPECT_THAT(std::string(nowhere.message()), testing::HasSubstr("no/where: cannot be written"));
}

}  // namespace
}  // namespace dejavu
