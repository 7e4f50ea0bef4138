#include "engine/model/opt_weights.h"

#include <cmath>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/tiny_checkpoint.h"

namespace dejavu {
namespace {

using testing::AllOf;
using testing::HasSubstr;

absl::StatusOr<OptWeights> LoadWeights(const TinyCheckpoint& tiny, const LoadProgress& progress = nullptr,
                                       std::optional<DType> dtype = std::nullopt) {
  const ScratchDirectory directory;
  tiny.Write(directory);
  const auto config = OptConfig::Load(directory.path());
  if (!config.ok()) return config.status();
  const auto checkpoint = Checkpoint::Open(directory.path());
  if (!checkpoint.ok()) return checkpoint.status();
  static const std::unique_ptr<Backend> backend = *CreateCpuBackend({1, false});
  return OptWeights::Load(*checkpoint, *config, Shard::Whole(*config), *backend, progress, dtype);
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
    EXPECT_EQ(layer.qkv.bias.row<float>(0)[16 + i], 0.0f) << "the softmax takes out a bias of the keys";
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

// [rows, cols] as float32, transposed if wanted.
std::vector<float> Matrix(const TinyCheckpoint& tiny, const std::string& name, bool transposed) {
  const TinyCheckpoint::Values& stored = tiny.tensors.at("model.decoder." + name);
  const int64_t rows = stored.shape[0], cols = stored.shape[1];
  std::vector<float> values(stored.data.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) values[transposed ? c * rows + r : r * cols + c] = stored.data[r * cols + c];
  }
  return values;
}

void ExpectQuantised(const std::vector<float>& stored, const Tensor& weight, const Tensor& scale, const char* name) {
  ASSERT_EQ(weight.dtype, DType::kInt8) << name;
  ASSERT_EQ(scale.cols, weight.rows) << name;
  ASSERT_EQ(static_cast<int64_t>(stored.size()), weight.rows * weight.cols) << name;
  for (int64_t r = 0; r < weight.rows; ++r) {
    const float* const row = &stored[r * weight.cols];
    float largest = 0.0f;
    for (int64_t c = 0; c < weight.cols; ++c) largest = std::max(largest, std::fabs(row[c]));
    const float factor = scale.row<float>(0)[r];
    ASSERT_FLOAT_EQ(factor, largest / 127.0f) << name << " row " << r;
    for (int64_t c = 0; c < weight.cols; ++c) {
      ASSERT_LE(std::fabs(weight.row<int8_t>(r)[c] * factor - row[c]), 0.501f * factor) << name << ' ' << r << ' ' << c;
    }
  }
}

// More than one stripe each; two rows of zeros, one of them transposed.
TEST(OptWeights, QuantisesEveryMatrixByRowAsItIsLaidOut) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(2, /*hidden=*/640, /*ffn=*/2501, /*layers=*/1);
  auto& fc1 = tiny.tensors.at("model.decoder.layers.0.fc1.weight").data;
  auto& fc2 = tiny.tensors.at("model.decoder.layers.0.fc2.weight").data;
  std::fill_n(fc1.begin() + int64_t{2000} * 640, 640, 0.0f);
  for (int i = 0; i < 640; ++i) fc2[i * 2501 + 7] = 0.0f;
  const auto weights = LoadWeights(tiny, nullptr, DType::kInt8);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const LayerWeights& layer = weights->layers[0];
  ExpectQuantised(Matrix(tiny, "layers.0.fc1.weight", false), layer.mlp.up.weight, layer.mlp.up.scale, "fc1");
  ExpectQuantised(Matrix(tiny, "layers.0.fc2.weight", true), layer.mlp.down.weight, layer.mlp.down.scale, "fc2");
  ExpectQuantised(Matrix(tiny, "layers.0.self_attn.out_proj.weight", true), layer.out.weight, layer.out.scale, "out");
  const char* const projections[] = {"q_proj", "k_proj", "v_proj"};
  for (int i = 0; i < 3; ++i) {
    ExpectQuantised(Matrix(tiny, std::string("layers.0.self_attn.") + projections[i] + ".weight", false),
                    layer.qkv.weight.Rows(i * 640, 640), layer.qkv.scale.Cols(i * 640, 640), projections[i]);
  }
  ExpectQuantised(Matrix(tiny, "embed_tokens.weight", false), weights->token_embedding.weight,
                  weights->token_embedding.scale, "embed_tokens");
  EXPECT_EQ(weights->head.weight.data, weights->token_embedding.weight.data) << "the head is tied: one copy";
  EXPECT_EQ(weights->head.scale.data, weights->token_embedding.scale.data);
  EXPECT_EQ(weights->position_embedding.dtype, DType::kFloat32);
  EXPECT_EQ(weights->dtype(), DType::kInt8);
}

TEST(OptWeights, ConvertsToTheNearestValue) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(5);
  auto& fc2 = tiny.tensors.at("model.decoder.layers.0.fc2.weight").data;
  const float eps = std::ldexp(1.0f, -8), half_eps = std::ldexp(1.0f, -11);
  fc2[0] = 1.0f + eps;  // between two bfloat16: a tie, to the even one
  fc2[1] = 1.0f + 3.0f * eps;
  fc2[2] = 1.0f + half_eps;  // the same for float16
  fc2[3] = 3e-7f;            // subnormal there
  const auto bf16 = LoadWeights(tiny, nullptr, DType::kBFloat16);
  ASSERT_TRUE(bf16.ok()) << bf16.status();
  const Tensor& down = bf16->layers[0].mlp.down.weight;  // transposed: [40, 16]
  ASSERT_EQ(down.dtype, DType::kBFloat16);
  EXPECT_EQ(down.row<uint16_t>(0)[0], 0x3F80);
  EXPECT_EQ(down.row<uint16_t>(1)[0], 0x3F82);
  EXPECT_EQ(bf16->position_embedding.dtype, DType::kBFloat16);
  const auto fp16 = LoadWeights(tiny, nullptr, DType::kFloat16);
  ASSERT_TRUE(fp16.ok()) << fp16.status();
  EXPECT_EQ(fp16->layers[0].mlp.down.weight.row<uint16_t>(2)[0], 0x3C00);
  EXPECT_EQ(fp16->layers[0].mlp.down.weight.row<uint16_t>(3)[0], 5);
  const auto fp32 = LoadWeights(tiny, nullptr, DType::kFloat32);
  ASSERT_TRUE(fp32.ok()) << fp32.status();
  EXPECT_EQ(fp32->layers[0].mlp.down.weight.row<float>(3)[0], 3e-7f);
}

TEST(OptWeights, RefusesValuesBeyondTheTypeThatTheyAreConvertedTo) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(6);
  tiny.tensors.at("model.decoder.layers.1.fc1.weight").data[77] = 70000.0f;
  EXPECT_TRUE(LoadWeights(tiny, nullptr, DType::kBFloat16).ok());
  const auto weights = LoadWeights(tiny, nullptr, DType::kFloat16);
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(weights.status().message()),
              AllOf(HasSubstr("model.decoder.layers.1.fc1.weight"), HasSubstr("70000"), HasSubstr("float16")));
}

TEST(OptWeights, HoldsAHeadOfItsOwnWhereItDiffersWhateverTheConfigSays) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(7).Untie(8);
  for (const bool tied : {false, true}) {
    tiny.config["tie_word_embeddings"] = tied;
    const auto weights = LoadWeights(tiny, nullptr, DType::kInt8);
    ASSERT_TRUE(weights.ok()) << weights.status();
    ASSERT_TRUE(weights->has_own_head());
    ExpectQuantised(tiny.tensors.at("lm_head.weight").data, weights->head.weight, weights->head.scale, "lm_head");
    ExpectQuantised(Matrix(tiny, "embed_tokens.weight", false), weights->token_embedding.weight,
                    weights->token_embedding.scale, "embed_tokens");
    TinyCheckpoint equal = tiny;
    equal.tensors["lm_head.weight"] = tiny.tensors.at("model.decoder.embed_tokens.weight");
    EXPECT_FALSE(LoadWeights(equal)->has_own_head()) << "one copy of what is equal";
  }
}

TEST(OptWeights, TakesTheHeadForTheEmbeddingOnlyWhereTheyAreTied) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(7);
  const auto embedding = tiny.tensors.extract("model.decoder.embed_tokens.weight");
  tiny.tensors["lm_head.weight"] = embedding.mapped();
  const auto weights = LoadWeights(tiny);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_FALSE(weights->has_own_head());
  EXPECT_EQ(weights->token_embedding.weight.row<float>(3)[5], embedding.mapped().data[3 * 16 + 5]);
  tiny.config["tie_word_embeddings"] = false;
  ExpectRefused(tiny, "model.decoder.embed_tokens.weight is missing", "tie_word_embeddings is false");
}

TEST(OptWeights, AnyMissingTensorIsNamed) {
  const TinyCheckpoint whole = TinyCheckpoint::Random(3);
  for (const auto& [name, values] : whole.tensors) {
    TinyCheckpoint tiny = whole;
    tiny.tensors.erase(name);
    ExpectRefused(tiny, name, "missing");
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
