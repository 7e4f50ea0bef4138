// What drafts compute with: attention and head in int8 beside the model's own weights.
#include "engine/model/draft_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/ranks/model_runner.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/tiny_checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

void ExpectSameRows(const LinearWeights& got, const LinearWeights& want) {
  ASSERT_EQ(got.weight.dtype, DType::kInt8);
  ASSERT_EQ(got.weight.rows, want.weight.rows);
  ASSERT_EQ(got.weight.cols, want.weight.cols);
  EXPECT_EQ(got.layout, want.layout);
  for (int64_t r = 0; r < want.weight.rows; ++r) {
    ASSERT_EQ(std::memcmp(got.weight.row<int8_t>(r), want.weight.row<int8_t>(r), want.weight.cols), 0) << "row " << r;
    ASSERT_EQ(got.scale.row<float>(0)[r], want.scale.row<float>(0)[r]) << "row " << r;
  }
  for (int64_t c = 0; c < want.bias.cols; ++c) ASSERT_EQ(got.bias.row<float>(0)[c], want.bias.row<float>(0)[c]);
}

// Larger than a stripe, and of half of the model; with a head that is tied, and one of its own.
TEST(DraftWeights, AreThoseOfAModelInInt8WhereDraftsReadEverything) {
  const auto backend = *CreateCpuBackend({1, false});
  for (const bool tied : {true, false}) {
    const ScratchDirectory directory;
    TinyCheckpoint tiny = TinyCheckpoint::Random(2, /*hidden=*/640, /*ffn=*/40, /*layers=*/2);
    if (!tied) tiny.Untie(3);
    tiny.Write(directory);
    const OptConfig config = *OptConfig::Load(directory.path());
    const Checkpoint checkpoint = *Checkpoint::Open(directory.path());
    for (int ranks = 1; ranks <= 2; ++ranks) {
      const Shard shard = *MakeShard(config, nullptr, ranks - 1, ranks);
      const auto stored = OptWeights::Load(checkpoint, config, shard, *backend, nullptr);
      const auto int8 = OptWeights::Load(checkpoint, config, shard, *backend, nullptr, DType::kInt8);
      ASSERT_TRUE(stored.ok() && int8.ok());
      const auto draft = DraftWeights::Create(*stored, *backend);
      ASSERT_TRUE(draft.ok()) << draft.status();
      EXPECT_EQ((*draft)->bytes(), DraftWeights::Measure(config, shard));
      const OptWeights& weights = (*draft)->weights();
      for (size_t l = 0; l < weights.layers.size(); ++l) {
        ExpectSameRows(weights.layers[l].qkv, int8->layers[l].qkv);
        ExpectSameRows(weights.layers[l].out, int8->layers[l].out);
        EXPECT_EQ(weights.layers[l].mlp.up.weight.data, stored->layers[l].mlp.up.weight.data) << "no copy";
      }
      ExpectSameRows(weights.head, int8->head);
      EXPECT_EQ(weights.token_embedding.weight.data, stored->token_embedding.weight.data);
    }
  }
}

class DraftSteps : public testing::Test {
 protected:
  std::vector<float> Decode(int ranks, bool made, bool drafts) {
    ModelRunner::Options options;
    options.model = CheckpointPath("pre-norm-hd128-sharded");
    options.predictor = directory_.Path("predictor.safetensors");
    if (predictor_.empty()) {
      predictor_ = WritePredictorFor(options.model,
                                     MakePredictor(OptConfig::Load(options.model).value(), Tap::kAttentionNorm, 4),
                                     options.predictor);
    }
    options.threads = ranks;
    options.ranks = ranks;
    options.window = 32;
    options.draft_weights = made;
    auto runner = ModelRunner::Create(options, nullptr).value();
    std::vector<float> all;
    for (int32_t position = 0; position < 8; ++position) {
      Batch& batch = runner->StartBatch();
      batch.drafts = drafts;
      batch.AddDecodeRow(0, position, 4 + 31 * position, /*wants_logits=*/true, {});
      const absl::Span<const float> logits = runner->Run();
      all.insert(all.end(), logits.begin(), logits.end());
    }
    return all;
  }

  static double Distance(const std::vector<float>& a, const std::vector<float>& b) {
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) sum += std::pow(a[i] - b[i], 2);
    return std::sqrt(sum / static_cast<double>(a.size()));
  }

 private:
  const ScratchDirectory directory_;
  std::string predictor_;
};

TEST_F(DraftSteps, AloneComputeWithThem) {
  const std::vector<float> stored = Decode(1, /*made=*/false, /*drafts=*/false);
  EXPECT_EQ(Decode(1, /*made=*/true, /*drafts=*/false), stored);
  EXPECT_EQ(Decode(1, /*made=*/false, /*drafts=*/true), stored) << "there are none";
  const std::vector<float> drafted = Decode(1, /*made=*/true, /*drafts=*/true);
  const double off = Distance(drafted, stored);
  EXPECT_GT(off, 0.0);
  EXPECT_LT(off, 0.05 * Distance(stored, std::vector<float>(stored.size(), 0.0f)));
}

// A rank that did not know of it would be off by what int8 does.
TEST_F(DraftSteps, ComputeWithThemOnEveryRank) {
  const std::vector<float> stored = Decode(1, true, false), alone = Decode(1, true, true);
  for (const int ranks : {2, 3}) {
    EXPECT_LT(Distance(Decode(ranks, true, true), alone), 0.1 * Distance(alone, stored)) << ranks << " ranks";
  }
}

}  // namespace
}  // namespace dejavu
