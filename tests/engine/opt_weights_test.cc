#include "engine/opt_weights.h"

#include <cmath>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/tiny_checkpoint.h"

namespace dejavu {
namespace {

using testing::AllOf;
using testing::HasSubstr;

absl::StatusOr<OptWeights> LoadWeights(const TinyCheckpoint& tiny, const LoadProgress& progress = nullptr) {
  const ScratchDirectory directory;
  tiny.Write(directory);
  const auto config = OptConfig::Load(directory.path());
  if (!config.ok()) return config.status();
  const auto checkpoint = Checkpoint::Open(directory.path());
  if (!checkpoint.ok()) return checkpoint.status();
  static const std::unique_ptr<Backend> backend = *CreateCpuBackend({1, false});
  return OptWeights::Load(*checkpoint, *config, *backend, progress);
}

void ExpectRefused(const TinyCheckpoint& tiny, const std::string& tensor, const std::string& reason) {
  const auto weights = LoadWeights(tiny);
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(weights.status().message()), AllOf(HasSubstr(tensor), HasSubstr(reason)));
}

TEST(OptWeights, PutsEveryTensorInItsPlace) {
  const TinyCheckpoint tiny = TinyCheckpoint::Random(1);
  const auto weights = LoadWeights(tiny);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const auto stored = [&](const std::string& name) { return tiny.tensors.at("model.decoder." + name).data; };
  const LayerWeights& layer = weights->layers[1];
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      EXPECT_EQ(layer.qkv.weight.row<float>(16 + i)[j], stored("layers.1.self_attn.k_proj.weight")[i * 16 + j]);
      EXPECT_EQ(layer.out.weight.row<float>(j)[i], stored("layers.1.self_attn.out_proj.weight")[i * 16 + j]);
    }
    EXPECT_EQ(layer.qkv.bias.row<float>(0)[32 + i], stored("layers.1.self_attn.v_proj.bias")[i]);
    for (int n = 0; n < 40; ++n) {
      EXPECT_EQ(layer.mlp.up.weight.row<float>(n)[i], stored("layers.1.fc1.weight")[n * 16 + i]);
      EXPECT_EQ(layer.mlp.down.weight.row<float>(n)[i], stored("layers.1.fc2.weight")[i * 40 + n]);
    }
  }
  EXPECT_EQ(weights->head.weight.data, weights->token_embedding.weight.data) << "the head is tied: one copy";
}

// The stripes of a large matrix, more than one of them, transposed and not.
TEST(OptWeights, ReadsMatricesThatAreLargerThanAStripe) {
  const TinyCheckpoint tiny = TinyCheckpoint::Random(2, /*hidden=*/640, /*ffn=*/2501, /*layers=*/1);
  const auto weights = LoadWeights(tiny);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const auto& down = tiny.tensors.at("model.decoder.layers.0.fc2.weight").data;
  const auto& up = tiny.tensors.at("model.decoder.layers.0.fc1.weight").data;
  for (int n = 0; n < 2501; ++n) {
    for (int i = 0; i < 640; ++i) {
      ASSERT_EQ(weights->layers[0].mlp.down.weight.row<float>(n)[i], down[i * 2501 + n]) << n << ' ' << i;
      ASSERT_EQ(weights->layers[0].mlp.up.weight.row<float>(n)[i], up[n * 640 + i]) << n << ' ' << i;
    }
  }
}

TEST(OptWeights, AnyMissingTensorIsNamed) {
  const TinyCheckpoint whole = TinyCheckpoint::Random(3);
  for (const auto& [name, values] : whole.tensors) {
    TinyCheckpoint tiny = whole;
    tiny.tensors.erase(name);
    ExpectRefused(tiny, name, name.find("embed_tokens") == std::string::npos ? "missing" : "not an OPT model");
  }
}

TEST(OptWeights, RefusesMisshapenAndSurplusTensors) {
  TinyCheckpoint misshapen = TinyCheckpoint::Random(4);
  misshapen.tensors.at("model.decoder.layers.0.fc2.weight").shape = {40, 16};
  ExpectRefused(misshapen, "model.decoder.layers.0.fc2.weight", "[16, 40]");

  TinyCheckpoint deeper = TinyCheckpoint::Random(4);
  deeper.config["num_hidden_layers"] = 1;
  ExpectRefused(deeper, "layers.1.", "num_hidden_layers = 1");
}

TEST(OptWeights, RefusesValuesThatAreNotFiniteWhereverTheyAre) {
  for (const char* name :
       {"embed_tokens.weight", "layers.0.fc2.weight", "layers.1.self_attn.v_proj.bias", "final_layer_norm.weight"}) {
    for (float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
      TinyCheckpoint tiny = TinyCheckpoint::Random(5);
      tiny.tensors.at(std::string("model.decoder.") + name).data.back() = bad;
      ExpectRefused(tiny, name, "not finite");
    }
  }
}

TEST(OptWeights, ReportsProgressUpToTheTotalAndStopsWhenTold) {
  int64_t last = 0, total = 0;
  const auto weights = LoadWeights(TinyCheckpoint::Random(6), [&](int64_t done, int64_t all) {
    EXPECT_GT(done, last);
    last = done;
    total = all;
    return true;
  });
  ASSERT_TRUE(weights.ok());
  EXPECT_EQ(last, total);
  const auto stopped = LoadWeights(TinyCheckpoint::Random(6), [](int64_t, int64_t) { return false; });
  EXPECT_EQ(stopped.status().code(), absl::StatusCode::kCancelled);
}

}  // namespace
}  // namespace dejavu
