#include "engine/model/predictor_file.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/ranks/model_runner.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/float16.h"
#include "nlohmann/json.hpp"
#include "tests/engine/formats/checkpoint_files.h"
#include "tests/engine/random_predictor.h"
#include "tests/engine/tiny_checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using Json = nlohmann::json;
using testing::HasSubstr;

constexpr char kHash[] = "sha256:of-this-model";
constexpr float kInfinity = std::numeric_limits<float>::infinity();

OptConfig TinyConfig() {
  const ScratchDirectory directory;
  TinyCheckpoint::Random(1).Write(directory);
  return *OptConfig::Load(directory.path());
}

void ExpectEqual(const SelectorData& a, const SelectorData& b) {
  EXPECT_EQ(a.rank, b.rank);
  EXPECT_EQ(a.a, b.a);
  EXPECT_EQ(a.a_scale, b.a_scale);
  EXPECT_EQ(a.b, b.b);
  for (size_t tier = 0; tier < a.points.size(); ++tier) {
    ASSERT_EQ(a.points[tier].has_value(), b.points[tier].has_value()) << "tier " << tier;
    if (!a.points[tier].has_value()) continue;
    EXPECT_EQ(a.points[tier]->rank, b.points[tier]->rank);
    EXPECT_EQ(a.points[tier]->thresholds, b.points[tier]->thresholds);
    EXPECT_EQ(a.points[tier]->missed_mass, b.points[tier]->missed_mass);
    EXPECT_EQ(a.points[tier]->missed_share, b.points[tier]->missed_share);
    EXPECT_EQ(a.points[tier]->density, b.points[tier]->density);
  }
}

void ExpectEqual(const PredictorData& a, const PredictorData& b) {
  EXPECT_EQ(a.weights_hash, b.weights_hash);
  EXPECT_EQ(a.tap, b.tap);
  EXPECT_EQ(a.tiers, b.tiers);
  EXPECT_EQ(Json::parse(a.report_json), Json::parse(b.report_json));
  ASSERT_EQ(a.layers.size(), b.layers.size());
  for (size_t l = 0; l < a.layers.size(); ++l) {
    SCOPED_TRACE(absl::StrCat("layer ", l));
    EXPECT_EQ(a.layers[l].tap, b.layers[l].tap);
    ExpectEqual(a.layers[l].neurons, b.layers[l].neurons);
    ExpectEqual(a.layers[l].heads, b.layers[l].heads);
    EXPECT_EQ(a.layers[l].worth, b.layers[l].worth);
    EXPECT_EQ(a.layers[l].frequency, b.layers[l].frequency);
  }
}

// A predictor file, taken apart.
struct FileParts {
  Json header, metadata;
  std::string data;

  std::string Bytes() const {
    Json whole = header;
    whole["__metadata__"][kPredictorMetadataKey] = metadata.dump();
    return Safetensors(whole.dump(), data);
  }
  // The bytes of a tensor in `data`.
  size_t begin_of(const std::string& tensor) const { return header.at(tensor).at("data_offsets").at(0).get<size_t>(); }
};

class PredictorFile : public testing::Test {
 protected:
  absl::StatusOr<PredictorData> Read(const std::string& path) const { return ReadPredictor(path, config_, kHash); }
  absl::StatusOr<PredictorData> ReadBytes(const std::string& bytes) const {
    return Read(directory_.Write("predictor.safetensors", bytes));
  }

  std::string Written(const PredictorData& data) const {
    const std::string path = directory_.Path("written.safetensors");
    EXPECT_TRUE(WritePredictor(data, config_, path).ok());
    return path;
  }
  std::string WrittenBytes(const PredictorData& data) const { return ReadAll(Written(data)); }

  FileParts Parts() const {
    const std::string bytes = WrittenBytes(data_);
    uint64_t length;
    std::memcpy(&length, bytes.data(), sizeof length);
    FileParts parts;
    parts.header = Json::parse(bytes.substr(8, length));
    parts.metadata = Json::parse(parts.header["__metadata__"][kPredictorMetadataKey].get<std::string>());
    parts.data = bytes.substr(8 + length);
    return parts;
  }

  // After `spoil`, the file is refused with its path and every one of `reasons`.
  void ExpectSpoiled(const std::function<void(FileParts*)>& spoil, std::vector<std::string> reasons) {
    FileParts parts = Parts();
    spoil(&parts);
    const absl::StatusOr<PredictorData> read = ReadBytes(parts.Bytes());
    reasons.push_back("predictor.safetensors");
    ExpectRefused(read, reasons);
    EXPECT_EQ(read.status().code(), absl::StatusCode::kInvalidArgument);
  }

  const ScratchDirectory directory_;
  const OptConfig config_ = TinyConfig();
  PredictorData data_ = RandomPredictor(config_, kHash, 3);
};

TEST_F(PredictorFile, ComesBackAsItWasWritten) {
  data_.tap = Tap::kPreviousLayer;
  data_.layers[1].tap = Tap::kPreviousLayer;
  data_.layers[0].neurons = {};
  auto& thresholds = data_.layers[1].neurons.points[static_cast<size_t>(Tier::kHigh)]->thresholds;
  thresholds[0] = -kInfinity;
  thresholds[1] = kInfinity;
  thresholds[2] = -0.333251953125f;  // a float16 value
  const auto read = Read(Written(data_));
  ASSERT_TRUE(read.ok()) << read.status();
  ExpectEqual(*read, data_);
}

TEST_F(PredictorFile, WithoutAReportOneIsStillReadable) {
  data_.report_json.clear();
  const auto read = Read(Written(data_));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->report_json, "{}");
}

TEST_F(PredictorFile, WritingLeavesNothingElseBehindAndNamesAFolderThatIsNotThere) {
  Written(data_);
  Written(data_);
  const std::filesystem::directory_iterator files(directory_.path());
  EXPECT_EQ(std::distance(begin(files), end(files)), 1);
  const absl::Status status = WritePredictor(data_, config_, directory_.Path("nowhere/p.safetensors"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("nowhere/p.safetensors: cannot be written: No such file"));
}

TEST_F(PredictorFile, OfOtherWeightsIsRefusedWithBothHashes) {
  const auto read = ReadPredictor(Written(data_), config_, "sha256:another");
  EXPECT_EQ(read.status().code(), absl::StatusCode::kFailedPrecondition);
  ExpectRefused(read, {"written.safetensors", "calibrated for other weights", kHash, "sha256:another"});
}

TEST_F(PredictorFile, OfAnotherShapeOrVersionIsRefused) {
  ExpectSpoiled([](FileParts* p) { p->metadata["ffn"] = 41; }, {"ffn = 41", "this one has 40"});
  ExpectSpoiled([](FileParts* p) { p->metadata["hidden"] = 32; }, {"hidden = 32"});
  ExpectSpoiled([](FileParts* p) { p->metadata["layers"] = 3; }, {"layers = 3"});
  ExpectSpoiled([](FileParts* p) { p->metadata["heads"] = uint64_t{1} << 63; }, {"\"heads\"", "9223372036854775808"});
  ExpectSpoiled([](FileParts* p) { p->metadata["version"] = 2; }, {"has version 2", "reads version 1"});
  ExpectSpoiled([](FileParts* p) { p->metadata.erase("version"); }, {"has version null"});
  ExpectSpoiled([](FileParts* p) { p->metadata["per_layer"].erase(1); }, {"2 layers"});
}

TEST_F(PredictorFile, WithARankThatDoesNotFitIsRefused) {
  const auto set_rank = [](const Json& rank) {
    return [rank](FileParts* p) { p->metadata["per_layer"][1]["neurons"]["rank"] = rank; };
  };
  ExpectSpoiled(set_rank(kRandomNeuronRank + 1), {"layers.1.neurons.a", "shape [6, 16]", "[7, 16]"});
  ExpectSpoiled(set_rank(-1), {"\"rank\" is -1"});
  ExpectSpoiled(set_rank(2.5), {"\"rank\" is 2.5"});
  ExpectSpoiled(set_rank((uint64_t{1} << 63) - 1), {"\"rank\" is 9223372036854775807"});
  ExpectSpoiled(set_rank(Json()), {"\"rank\" is null"});
  const auto set_point = [](int rank) {
    return [rank](FileParts* p) { p->metadata["per_layer"][0]["heads"]["points"]["balanced"]["rank"] = rank; };
  };
  ExpectSpoiled(set_point(kRandomHeadRank + 1), {"\"rank\" is 4", "1 ... 3", "layers.0.heads"});
  ExpectSpoiled(set_point(0), {"\"rank\" is 0", "layers.0.heads"});
}

TEST_F(PredictorFile, WithValuesThatAreNotFiniteIsRefused) {
  const auto put = [](const std::string& tensor, size_t offset, uint64_t bits, int width) {
    return [=](FileParts* p) { p->data = Patched(p->data, p->begin_of(tensor) + offset, bits, width); };
  };
  constexpr uint64_t kNaN = 0x7FC00000, kInfinityBits = 0x7F800000, kHalfNaN = 0x7E00, kMinusOne = 0xBF800000;
  ExpectSpoiled(put("layers.0.neurons.a_scale", 4, kNaN, 4), {"layers.0.neurons.a_scale", "not finite"});
  ExpectSpoiled(put("layers.1.heads.a_scale", 0, kInfinityBits, 4), {"layers.1.heads.a_scale", "not finite"});
  ExpectSpoiled(put("layers.1.neurons.thresholds.fast", 78, kHalfNaN, 2), {"layers.1.neurons.thresholds.fast", "NaN"});
  ExpectSpoiled(put("layers.1.heads.thresholds.balanced", 2, kHalfNaN, 2), {"heads.thresholds.balanced", "NaN"});
  ExpectSpoiled(put("layers.0.worth", 156, kNaN, 4), {"layers.0.worth", "not finite"});
  ExpectSpoiled(put("layers.0.worth", 0, kMinusOne, 4), {"layers.0.worth", "negative"});
  ExpectSpoiled(put("layers.0.frequency", 0, kInfinityBits, 4), {"layers.0.frequency", "not finite"});
  const auto set_point = [](const char* key, const Json& value) {
    return [=](FileParts* p) { p->metadata["per_layer"][1]["neurons"]["points"]["high"][key] = value; };
  };
  ExpectSpoiled(set_point("missed_mass", Json()), {"\"missed_mass\" is null", "layers.1.neurons"});
  ExpectSpoiled(set_point("missed_share", -0.1), {"\"missed_share\" is -0.1"});
  ExpectSpoiled(set_point("density", 1.5), {"\"density\" is 1.5"});
}

TEST_F(PredictorFile, WithoutATensorOrWithOneOfAnotherTypeIsRefused) {
  const FileParts whole = Parts();
  for (const auto& item : whole.header.items()) {
    const std::string name = item.key();
    if (name == "__metadata__") continue;
    const auto rename = [&](FileParts* p) {
      p->header["another"] = p->header[name];
      p->header.erase(name);
    };
    ExpectSpoiled(rename, {name, "missing"});
    // Of the same size in bytes.
    const std::string was = item.value()["dtype"];
    const std::string other = was == "F32" ? "F16" : was == "F16" ? "BF16" : "U8";
    ExpectSpoiled(
        [&](FileParts* p) {
          p->header[name]["dtype"] = other;
          if (was == "F32") p->header[name]["shape"][0] = item.value()["shape"][0].get<int>() * 2;
        },
        {name});
  }
}

TEST_F(PredictorFile, WithHugeShapesOrOffsetsIsRefused) {
  const std::string name = "layers.0.neurons.b";
  for (const uint64_t huge : {(uint64_t{1} << 63) - 1, uint64_t{1} << 63, ~uint64_t{0}, uint64_t{1} << 32}) {
    ExpectSpoiled([&](FileParts* p) { p->header[name]["shape"] = {huge, huge}; }, {name});
    ExpectSpoiled([&](FileParts* p) { p->header[name]["shape"] = {huge, 0}; }, {name});
    ExpectSpoiled([&](FileParts* p) { p->header[name]["data_offsets"] = {0, huge}; }, {name});
    ExpectSpoiled([&](FileParts* p) { p->header[name]["data_offsets"] = {huge, huge}; }, {name});
    ExpectRefused(ReadBytes(Little(huge, 8) + "{}"), {"header"});
  }
}

TEST_F(PredictorFile, WithTiersOrTapsThatMakeNoSenseIsRefused) {
  ExpectSpoiled([](FileParts* p) { p->metadata["tiers"] = {"high", "exact"}; }, {"\"tiers\"", "exact"});
  ExpectSpoiled([](FileParts* p) { p->metadata["tiers"] = {"high"}; }, {"operating point", "layers.0.neurons"});
  ExpectSpoiled([](FileParts* p) { p->metadata["tiers"] = 3; }, {"\"tiers\""});
  ExpectSpoiled([](FileParts* p) { p->metadata["tap"] = "nowhere"; }, {"\"tap\"", "nowhere"});
  ExpectSpoiled([](FileParts* p) { p->metadata["per_layer"][0]["tap"] = "previous-layer"; }, {"layer 0", "tap"});
  // The heads are chosen before the input of the MLP is known.
  ExpectSpoiled([](FileParts* p) { p->metadata["per_layer"][1]["tap"] = "mlp-norm"; }, {"layer 1", "heads"});
  ExpectSpoiled([](FileParts* p) { p->metadata["per_layer"][0]["neurons"] = 7; }, {"layers.0.neurons"});
}

TEST_F(PredictorFile, OfAnotherKindIsRefused) {
  const ScratchDirectory model;
  TinyCheckpoint::Random(1).Write(model);
  ExpectRefused(Read(model.Path("model.safetensors")), {"model.safetensors", "is no predictor"});
  ExpectRefused(Read(model.Path("config.json")), {"config.json"});
  ExpectRefused(Read(model.path()), {model.path()});
  ExpectRefused(Read(model.Path("nothing")), {"nothing"});
  ExpectRefused(ReadBytes(""), {"predictor.safetensors"});
}

TEST_F(PredictorFile, CutOffAnywhereIsRefused) {
  const std::string bytes = WrittenBytes(data_);
  ASSERT_TRUE(ReadBytes(bytes).ok());
  for (size_t length = 0; length < bytes.size(); length += 1 + length / 64) {
    ExpectRefused(ReadBytes(bytes.substr(0, length)), {"predictor.safetensors"});
  }
  ExpectRefused(ReadBytes(bytes.substr(0, bytes.size() - 1)), {"predictor.safetensors"});
}

// A damaged file is refused or, where the damage makes another predictor, loaded and used.
TEST_F(PredictorFile, DamagedInAnyByteNeverCrashes) {
  const ScratchDirectory model;
  TinyCheckpoint::Random(1).Write(model);
  ModelRunner::Options options;
  options.model = model.path();
  options.threads = 1;
  options.max_rows = options.max_audits = 3;
  options.window = 4;
  const auto runner = *ModelRunner::Create(options, nullptr);
  const std::string bytes = WrittenBytes(data_);
  const size_t header_bytes = bytes.size() - Parts().data.size();
  std::mt19937 random(5);
  int accepted = 0;
  constexpr int kFiles = 3000;
  for (int i = 0; i < kFiles; ++i) {
    std::string damaged = bytes;
    // Half of them in the header.
    const size_t range = i % 2 == 0 ? header_bytes : bytes.size();
    for (uint32_t n = 1 + random() % 3; n > 0; --n) damaged[random() % range] = static_cast<char>(random());
    const auto read = ReadBytes(damaged);
    if (!read.ok()) {
      EXPECT_THAT(std::string(read.status().message()), HasSubstr("predictor.safetensors"));
      continue;
    }
    ++accepted;
    ASSERT_TRUE(runner->SetPredictor(&*read).ok());
    Batch& batch = runner->StartBatch();
    for (const Tier tier : read->tiers) {
      if (batch.rows_left() == 0) break;
      batch.audit_rows.push_back(batch.rows());
      batch.AddDecodeRow(0, batch.rows(), 7, /*wants_logits=*/true, {tier});
    }
    if (batch.rows() > 0) runner->Run();
  }
  EXPECT_GT(accepted, kFiles / 20);
  EXPECT_LT(accepted, kFiles * 9 / 10);
}

}  // namespace
}  // namespace dejavu
