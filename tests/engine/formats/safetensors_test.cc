#include <random>

#include "engine/formats/checkpoint.h"
#include "tests/engine/formats/checkpoint_files.h"

namespace dejavu {
namespace {

using testing::ElementsAre;

class SafetensorsTest : public testing::Test {
 protected:
  absl::StatusOr<TensorMap> ReadBytes(const std::string& bytes) {
    absl::StatusOr<FileTensors> file = ReadSafetensorsHeader(directory_.Write("t.safetensors", bytes));
    if (!file.ok()) return file.status();
    return file->tensors;
  }
  absl::StatusOr<TensorMap> ReadHeader(const std::string& header, size_t data_bytes = 16) {
    return ReadBytes(Safetensors(header, std::string(data_bytes, '\x01')));
  }
  // One tensor "w".
  absl::StatusOr<TensorMap> ReadEntry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return ReadHeader(R"({"w":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}");
  }

  const ScratchDirectory directory_;
  const std::string path_ = directory_.Path("t.safetensors");
};

TEST_F(SafetensorsTest, ReadsTensorsAndLeavesOutMetadataAndOtherTypes) {
  const auto tensors = ReadBytes(Safetensors(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2,1],"data_offsets":[8,12]},)"
      R"("ids":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},"none":{"dtype":"BF16","shape":[0],"data_offsets":[8,8]},)"
      R"("s":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}   )",
      std::string(8, '\0') + "\x01\x02\x03\x04" + "wxyz"));
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 3);
  const StoredTensor& a = tensors->at("a");
  EXPECT_EQ(a.name, "a");
  EXPECT_EQ(a.dtype, DType::kFloat16);
  EXPECT_THAT(a.shape, ElementsAre(2, 1));
  EXPECT_EQ(a.elements, 2);
  uint16_t second = 0;
  ASSERT_TRUE(Checkpoint::Read(a, 1, 1, &second).ok());
  EXPECT_EQ(second, 0x0403);
  EXPECT_EQ(tensors->at("s").elements, 1);
  EXPECT_EQ(tensors->at("none").elements, 0);
  EXPECT_EQ(tensors->at("none").dtype, DType::kBFloat16);
}

TEST_F(SafetensorsTest, RefusesAHeaderLengthBeyondTheFileOrTheLimit) {
  const std::string valid = Safetensors(R"({"w":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}})", "ab");
  for (const uint64_t length : {uint64_t{1} << 63, UINT64_MAX, UINT64_MAX - 7, uint64_t{1} << 40,
                                uint64_t{valid.size()}, uint64_t{valid.size() - 7}}) {
    ExpectRefused(ReadBytes(Patched(valid, 0, length, 8)), {path_, "header of " + std::to_string(length)});
  }
  const std::string path = directory_.Write("t.safetensors", Little(uint64_t{101} << 20, 8));
  std::filesystem::resize_file(path, uint64_t{1} << 30);  // sparse
  ExpectRefused(ReadSafetensorsHeader(path), {path, "the limit here is 100000000"});
}

TEST_F(SafetensorsTest, RefusesAFileCutAnywhere) {
  const std::string valid = Safetensors(R"({"w":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}})", "ab");
  ASSERT_TRUE(ReadBytes(valid).ok());
  for (size_t size = 0; size < valid.size(); ++size) ExpectRefused(ReadBytes(valid.substr(0, size)), {path_});
}

TEST_F(SafetensorsTest, RefusesWhatIsNotAnObjectOfTensors) {
  ExpectRefused(ReadHeader("[]"), {path_, "not an object"});
  ExpectRefused(ReadHeader("{\"w\":"), {path_, "not valid JSON"});
  ExpectRefused(ReadHeader("{\"\xff\":1}"), {path_, "not valid JSON"});
  ExpectRefused(ReadHeader("{\"w\":1e999}"), {path_, "not valid JSON"});
  ExpectRefused(ReadHeader("{\"w\":7}"), {path_, "\"w\"", "not described by an object"});
  ExpectRefused(ReadHeader("{\"w\":{}}"), {path_, "\"w\"", "dtype"});
  ExpectRefused(ReadHeader(std::string(100'000, '[')), {path_, "nested deeper"});
  std::string many = "{\"w\":[0";
  for (int i = 0; i < 2'000'000; ++i) many += ",0";
  ExpectRefused(ReadHeader(many + "]}"), {path_, "JSON values"});
}

TEST_F(SafetensorsTest, RefusesATensorThatAppearsTwice) {
  const std::string entry = R"("w":{"dtype":"F16","shape":[1],"data_offsets":[0,2]})";
  ExpectRefused(ReadHeader("{" + entry + "," + entry + "}"), {path_, "\"w\"", "twice"});
}

TEST_F(SafetensorsTest, RefusesOffsetsOutsideTheData) {
  for (const char* offsets : {"[0,18]", "[16,20]", "[4,0]", "[18446744073709551614,2]", "[9223372036854775807,1]",
                              "[-4,0]", "[0.0,4.0]", "[0]", "[0,4,8]", "{}", "[0,1e30]", "[0,null]"}) {
    SCOPED_TRACE(offsets);
    ExpectRefused(ReadEntry("\"F16\"", "[2]", offsets), {path_, "tensor \"w\""});
    ExpectRefused(ReadEntry("\"I64\"", "[2]", offsets), {path_, "tensor \"w\""});
  }
}

TEST_F(SafetensorsTest, RefusesImpossibleShapes) {
  for (const char* shape : {"[-2]", "[2.0]", "[18446744073709551616]", "[18446744073709551615]",
                            "[4294967296,4294967296]", "[9223372036854775807,2]", "[4611686018427387904,4]",
                            "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,"
                            "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2]",
                            "\"2\"", "null", "[[2]]"}) {
    SCOPED_TRACE(shape);
    ExpectRefused(ReadEntry("\"F16\"", shape, "[0,4]"), {path_, "tensor \"w\""});
    ExpectRefused(ReadEntry("\"U8\"", shape, "[0,4]"), {path_, "tensor \"w\""});
  }
}

TEST_F(SafetensorsTest, RefusesASizeThatIsNotThatOfTheShape) {
  ASSERT_TRUE(ReadEntry("\"F16\"", "[8]", "[0,16]").ok());
  ExpectRefused(ReadEntry("\"F16\"", "[2]", "[0,6]"), {path_, "tensor \"w\"", "needs 4 bytes", "has 6"});
  ExpectRefused(ReadEntry("\"F32\"", "[2]", "[0,4]"), {path_, "tensor \"w\"", "needs 8 bytes", "has 4"});
  ExpectRefused(ReadEntry("7", "[2]", "[0,4]"), {path_, "tensor \"w\"", "dtype"});
}

TEST_F(SafetensorsTest, RefusesOverlappingTensorsOfAnyType) {
  ExpectRefused(ReadHeader(R"({"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},)"
                           R"("b":{"dtype":"F16","shape":[2],"data_offsets":[2,6]}})"),
                {path_, "\"b\"", "overlap"});
  ExpectRefused(ReadHeader(R"({"a":{"dtype":"F16","shape":[2],"data_offsets":[4,8]},)"
                           R"("b":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}})"),
                {path_, "\"a\"", "overlap"});
}

// A mutated file may still be valid; it must only do no harm.
TEST_F(SafetensorsTest, SurvivesRandomDamage) {
  const std::string valid = Safetensors(R"({"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},)"
                                        R"("b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
                                        std::string(16, '\x01'));
  std::mt19937 random(1);
  for (int round = 0; round < 4000; ++round) {
    std::string bytes = valid;
    for (uint32_t flips = 1 + random() % 4; flips > 0; --flips) bytes[random() % bytes.size()] ^= 1 << random() % 8;
    if (random() % 4 == 0) bytes.resize(random() % bytes.size());
    ExpectReadableIfAccepted(ReadBytes(bytes));
  }
}

}  // namespace
}  // namespace dejavu
