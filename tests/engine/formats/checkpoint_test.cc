#include "engine/formats/checkpoint.h"

#include <sys/stat.h>

#include <algorithm>
#include <bit>

#include "absl/strings/str_cat.h"
#include "tests/engine/formats/checkpoint_files.h"

namespace dejavu {
namespace {

constexpr const char* kTestdata = TESTDATA "/opt/";

// A file with the float16 tensors `names`, one element each, whose bits are `value`.
std::string SmallSafetensors(const std::vector<std::string>& names, uint16_t value) {
  std::string header;
  std::string data;
  for (const std::string& name : names) {
    absl::StrAppend(&header, header.empty() ? "{" : ",", "\"", name, R"(":{"dtype":"F16","shape":[1],"data_offsets":[)",
                    data.size(), ",", data.size() + 2, "]}");
    data += Little(value, 2);
  }
  return Safetensors(header + "}", data);
}

// The first element's bits.
template <typename Bits>
Bits First(const Checkpoint& checkpoint, const std::string& name) {
  const StoredTensor* tensor = checkpoint.Find(name);
  Bits bits = 0;
  if (tensor == nullptr || !Checkpoint::Read(*tensor, 0, 1, &bits).ok()) ADD_FAILURE() << name;
  return bits;
}

void ExpectTensor(const Checkpoint& checkpoint, const std::string& name, DType dtype,
                  const std::vector<int64_t>& shape) {
  const StoredTensor* tensor = checkpoint.Find(name);
  ASSERT_NE(tensor, nullptr) << name;
  EXPECT_EQ(tensor->name, name);
  EXPECT_EQ(tensor->dtype, dtype) << name;
  EXPECT_EQ(tensor->shape, shape) << name;
  std::string data(tensor->elements * SizeOf(dtype), '\0');
  EXPECT_TRUE(Checkpoint::Read(*tensor, 0, tensor->elements, data.data()).ok()) << name;
}

// Names, types and shapes of an OPT checkpoint with 2 layers.
void ExpectOptLayers(const Checkpoint& checkpoint, const std::string& prefix, DType dtype, int64_t hidden,
                     int64_t ffn) {
  for (const char* layer : {"layers.0.", "layers.1."}) {
    const std::string base = absl::StrCat(prefix, layer);
    for (const char* projection : {"q_proj", "k_proj", "v_proj", "out_proj"}) {
      ExpectTensor(checkpoint, absl::StrCat(base, "self_attn.", projection, ".weight"), dtype, {hidden, hidden});
      ExpectTensor(checkpoint, absl::StrCat(base, "self_attn.", projection, ".bias"), dtype, {hidden});
    }
    for (const char* norm : {"self_attn_layer_norm", "final_layer_norm"}) {
      ExpectTensor(checkpoint, absl::StrCat(base, norm, ".weight"), dtype, {hidden});
      ExpectTensor(checkpoint, absl::StrCat(base, norm, ".bias"), dtype, {hidden});
    }
    ExpectTensor(checkpoint, base + "fc1.weight", dtype, {ffn, hidden});
    ExpectTensor(checkpoint, base + "fc1.bias", dtype, {ffn});
    ExpectTensor(checkpoint, base + "fc2.weight", dtype, {hidden, ffn});
    ExpectTensor(checkpoint, base + "fc2.bias", dtype, {hidden});
  }
}

// Expected bits were read with numpy from the same files.
TEST(Checkpoint, ReadsOneSafetensorsFile) {
  const auto checkpoint = Checkpoint::Open(absl::StrCat(kTestdata, "pre-norm-hd64"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->tensors().size(), 36);
  ExpectOptLayers(*checkpoint, "model.decoder.", DType::kFloat16, 192, 768);
  ExpectTensor(*checkpoint, "model.decoder.embed_tokens.weight", DType::kFloat16, {1003, 192});
  ExpectTensor(*checkpoint, "model.decoder.embed_positions.weight", DType::kFloat16, {98, 192});
  EXPECT_EQ(First<uint16_t>(*checkpoint, "model.decoder.embed_positions.weight"), 0x3006);
  EXPECT_EQ(First<uint16_t>(*checkpoint, "model.decoder.final_layer_norm.bias"), 0xaec3);
  EXPECT_EQ(checkpoint->Find("model.decoder.layers.2.fc1.weight"), nullptr);
}

TEST(Checkpoint, ReadsShardedSafetensors) {
  const auto checkpoint = Checkpoint::Open(absl::StrCat(kTestdata, "pre-norm-hd128-sharded"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->tensors().size(), 36);
  ExpectOptLayers(*checkpoint, "model.decoder.", DType::kBFloat16, 256, 1024);
  EXPECT_EQ(First<uint16_t>(*checkpoint, "model.decoder.embed_tokens.weight"), 0x3e06);
  EXPECT_EQ(First<uint16_t>(*checkpoint, "model.decoder.layers.1.fc2.bias"), 0xbcf3);
}

TEST(Checkpoint, ReadsOneTorchFile) {
  const auto checkpoint = Checkpoint::Open(absl::StrCat(kTestdata, "pre-norm-hd80"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->tensors().size(), 37);
  ExpectOptLayers(*checkpoint, "model.decoder.", DType::kFloat16, 160, 640);
  ExpectTensor(*checkpoint, "lm_head.weight", DType::kFloat16, {512, 160});
  EXPECT_EQ(First<uint16_t>(*checkpoint, "lm_head.weight"), 0x2a12);  // 0.0474
}

TEST(Checkpoint, ReadsOldKeysAndThePostNormForm) {
  const auto old_keys = Checkpoint::Open(absl::StrCat(kTestdata, "old-key-prefix"));
  ASSERT_TRUE(old_keys.ok()) << old_keys.status();
  EXPECT_EQ(old_keys->tensors().size(), 36);
  ExpectOptLayers(*old_keys, "decoder.", DType::kFloat16, 128, 512);
  EXPECT_EQ(First<uint16_t>(*old_keys, "decoder.final_layer_norm.weight"), 0x3b92);  // 0.9463

  const auto post_norm = Checkpoint::Open(absl::StrCat(kTestdata, "post-norm-350m-form"));
  ASSERT_TRUE(post_norm.ok()) << post_norm.status();
  EXPECT_EQ(post_norm->tensors().size(), 37);
  ExpectOptLayers(*post_norm, "model.decoder.", DType::kFloat16, 128, 512);
  ExpectTensor(*post_norm, "model.decoder.project_in.weight", DType::kFloat16, {128, 64});
  ExpectTensor(*post_norm, "model.decoder.project_out.weight", DType::kFloat16, {64, 128});
}

TEST(Checkpoint, ReadsShardedTorchFiles) {
  const auto checkpoint = Checkpoint::Open(absl::StrCat(kTestdata, "odd-ffn-float32"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->tensors().size(), 37);
  ExpectOptLayers(*checkpoint, "model.decoder.", DType::kFloat32, 128, 301);
  EXPECT_FLOAT_EQ(std::bit_cast<float>(First<uint32_t>(*checkpoint, "lm_head.weight")), -0.25225818F);
  EXPECT_FLOAT_EQ(std::bit_cast<float>(First<uint32_t>(*checkpoint, "model.decoder.layers.1.fc1.bias")), 0.4524088501F);
}

class CheckpointTest : public testing::Test {
 protected:
  absl::StatusOr<Checkpoint> Open() { return Checkpoint::Open(directory_.path()); }
  std::string WriteIndex(const std::string& weight_map) {
    return directory_.Write("model.safetensors.index.json", R"({"metadata": {}, "weight_map": )" + weight_map + "}");
  }

  const ScratchDirectory directory_;
};

TEST_F(CheckpointTest, SaysWhatItLookedForInADirectoryWithoutWeights) {
  const auto checkpoint = Open();
  EXPECT_TRUE(absl::IsNotFound(checkpoint.status()));
  ExpectRefused(checkpoint, {directory_.path(),
                             "model.safetensors, model.safetensors.index.json, pytorch_model.bin, "
                             "pytorch_model.bin.index.json"});
  EXPECT_TRUE(absl::IsNotFound(Checkpoint::Open(directory_.Path("absent")).status()));
  ExpectRefused(Checkpoint::Open(directory_.Write("file", "")), {directory_.Path("file"), "not a directory"});
}

TEST_F(CheckpointTest, PrefersSafetensors) {
  directory_.Write("pytorch_model.bin", "not even a zip");
  const std::string index = directory_.Write("pytorch_model.bin.index.json", "{}");
  ExpectRefused(Open(), {directory_.Path("pytorch_model.bin: ")});
  WriteIndex("{}");
  ExpectRefused(Open(), {directory_.Path("model.safetensors.index.json: ")});
  directory_.Write("model.safetensors", SmallSafetensors({"w"}, 1));
  EXPECT_TRUE(Open().ok());
}

TEST_F(CheckpointTest, TakesAllTensorsOfTheShardsThatTheIndexNames) {
  directory_.Write("a.safetensors", SmallSafetensors({"x", "y"}, 1));
  directory_.Write("b.safetensors", SmallSafetensors({"x", "z"}, 2));
  directory_.Write("c.safetensors", SmallSafetensors({"v"}, 3));
  WriteIndex(R"({"x": "a.safetensors", "y": "b.safetensors"})");
  const auto checkpoint = Open();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->tensors().size(), 3);
  EXPECT_EQ(First<uint16_t>(*checkpoint, "x"), 2) << "the last shard has it";
  EXPECT_EQ(First<uint16_t>(*checkpoint, "y"), 1);
  EXPECT_EQ(First<uint16_t>(*checkpoint, "z"), 2);
}

TEST_F(CheckpointTest, NamesTheTypeOfTensorsThatAreNoWeights) {
  const std::string path =
      directory_.Write("model.safetensors",
                       Safetensors(R"({"w":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}})", std::string(8, 'x')));
  const auto checkpoint = Open();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->Find("w"), nullptr);
  EXPECT_EQ(checkpoint->Missing("w").message(),
            path + ": tensor w is of type F64; weights must be float32, float16 or bfloat16");
  EXPECT_EQ(checkpoint->Missing("v").message(), path + ": tensor v is missing");
}

TEST_F(CheckpointTest, FollowsTheLinksOfAHuggingFaceCache) {
  std::filesystem::create_directory(directory_.Path("blobs"));
  directory_.Write("blobs/0123", SmallSafetensors({"w"}, 1));
  std::filesystem::create_symlink("blobs/0123", directory_.Path("model.safetensors"));
  EXPECT_TRUE(Open().ok());
  std::filesystem::remove(directory_.Path("blobs/0123"));
  ExpectRefused(Open(), {directory_.Path("model.safetensors"), "No such file"});
}

TEST_F(CheckpointTest, RefusesAnIndexThatLeadsElsewhere) {
  const ScratchDirectory outside;
  const std::string secret = outside.Write("secret.safetensors", SmallSafetensors({"w"}, 1));
  std::filesystem::create_directory(directory_.Path("sub"));
  directory_.Write("sub/a.safetensors", SmallSafetensors({"w"}, 1));
  const std::string name = std::filesystem::path(outside.path()).filename().string();
  const std::string traversal = "../" + name + "/secret.safetensors";
  ASSERT_TRUE(std::filesystem::exists(directory_.Path(traversal)));
  for (const std::string& shard : {traversal, secret, std::string("sub/a.safetensors"), std::string("..safetensors"),
                                   std::string("a.safetensors\\u0000x"), std::string(""), std::string("config.json")}) {
    const std::string index = WriteIndex(absl::StrCat(R"({"w": ")", shard, "\"}"));
    ExpectRefused(Open(), {index, "tensor \"w\"", "not to the name of a .safetensors file"});
  }
  ExpectRefused((WriteIndex(R"({"w": 7})"), Open()), {"tensor \"w\"", "number"});
}

TEST_F(CheckpointTest, NamesShardsAndTensorsThatAreMissing) {
  const std::string index = WriteIndex(R"({"w": "a.safetensors", "x": "b.safetensors"})");
  directory_.Write("a.safetensors", SmallSafetensors({"w"}, 1));
  ExpectRefused(Open(), {directory_.Path("b.safetensors"), "No such file", "tensor \"x\"", index});
  directory_.Write("b.safetensors", SmallSafetensors({"other"}, 1));
  const auto promised = Open();
  ASSERT_TRUE(promised.ok()) << promised.status();
  EXPECT_TRUE(promised->IsExpected("x"));
  for (const std::string& part : {directory_.Path("b.safetensors"), std::string("no tensor \"x\""), index}) {
    EXPECT_THAT(std::string(promised->Missing("x").message()), testing::HasSubstr(part));
  }
  directory_.Write("b.safetensors", "");
  ExpectRefused(Open(), {directory_.Path("b.safetensors"), "0 bytes", "tensor \"x\"", index});
}

TEST_F(CheckpointTest, RefusesABrokenIndex) {
  const std::string path = directory_.Path("model.safetensors.index.json");
  directory_.Write("a.safetensors", SmallSafetensors({"w"}, 1));
  for (const char* text : {"", "[", "[]", "{}", R"({"weight_map": []})", R"({"weight_map": {}})",
                           R"({"weight_map": 1})", R"({"weight_map": {"w": "a.safetensors", "w": "a.safetensors"}})"}) {
    directory_.Write("model.safetensors.index.json", text);
    ExpectRefused(Open(), {path});
  }
  directory_.Write("model.safetensors.index.json", "{");
  std::filesystem::resize_file(path, (int64_t{64} << 20) + 1);
  ExpectRefused(Open(), {path, "the limit is 67108864"});
}

TEST_F(CheckpointTest, RefusesWhatIsNotARegularFile) {
  const std::string path = directory_.Path("model.safetensors");
  std::filesystem::create_directory(path);
  ExpectRefused(Open(), {path, "not a regular file"});
  std::filesystem::remove(path);
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  ExpectRefused(Open(), {path, "not a regular file"});  // and does not wait for a writer
}

TEST_F(CheckpointTest, RecognisesAGitLfsPointer) {
  const char* pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 250540281\n";
  for (const char* name : {"pytorch_model.bin", "model.safetensors"}) {
    directory_.Write(name, pointer);
    ExpectRefused(Open(), {directory_.Path(name), "git lfs pull"});
  }
}

TEST_F(CheckpointTest, ReportsAFileThatShrinksAfterItWasOpened) {
  const std::string path = directory_.Write("model.safetensors", SmallSafetensors({"v", "w"}, 1));
  const auto checkpoint = Open();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
  uint16_t bits = 0;
  EXPECT_TRUE(Checkpoint::Read(*checkpoint->Find("v"), 0, 1, &bits).ok());
  const absl::Status status = Checkpoint::Read(*checkpoint->Find("w"), 0, 1, &bits);
  EXPECT_TRUE(absl::IsDataLoss(status));
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr(path));
}

TEST_F(CheckpointTest, ReadsARangeOfElements) {
  const auto checkpoint = Checkpoint::Open(absl::StrCat(kTestdata, "pre-norm-hd64"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const StoredTensor& tensor = *checkpoint->Find("model.decoder.embed_tokens.weight");
  std::vector<uint16_t> all(tensor.elements);
  ASSERT_TRUE(Checkpoint::Read(tensor, 0, tensor.elements, all.data()).ok());
  std::vector<uint16_t> part(192);
  ASSERT_TRUE(Checkpoint::Read(tensor, 192 * 1002, 192, part.data()).ok());
  EXPECT_TRUE(std::equal(part.begin(), part.end(), all.end() - 192));
  EXPECT_TRUE(Checkpoint::Read(tensor, tensor.elements, 0, nullptr).ok());
  EXPECT_DEATH(Checkpoint::Read(tensor, tensor.elements, 1, part.data()).IgnoreError(), "embed_tokens");
}

}  // namespace
}  // namespace dejavu
