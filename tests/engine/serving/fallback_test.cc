// How a layer goes EXACT and comes back, with a model and a predictor whose shadow checks a test can make fail at will.
#include <algorithm>
#include <atomic>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/serving/embedded_engine.h"
#include "tests/engine/tiny_checkpoint.h"

namespace dejavu {
namespace {

// A model whose first coordinate says whether a token is below 25, and a predictor that then selects nothing in the
// first layer, and else everything.
class Fickle : public testing::Test {
 protected:
  static constexpr int kTokens = 60;

  void SetUp() override {
    TinyCheckpoint tiny = TinyCheckpoint::Random(5, /*hidden=*/16, kFfn);
    tiny.config["max_position_embeddings"] = 128;
    auto& positions = tiny.tensors.at("model.decoder.embed_positions.weight");
    positions.shape[0] = 130;
    positions.data.assign(size_t{130} * 16, 0.01f);
    auto& tokens = tiny.tensors.at("model.decoder.embed_tokens.weight").data;
    for (size_t id = 0; id < 50; ++id) tokens[id * 16] = id < 25 ? -1.0f : 1.0f;
    tiny.tensors.at("model.decoder.layers.0.self_attn_layer_norm.weight").data[0] = 1.0f;
    tiny.tensors.at("model.decoder.layers.0.self_attn_layer_norm.bias").data[0] = 0.0f;
    tiny.Write(directory_);

    PredictorData data = MakePredictor(OptConfig::Load(directory_.path()).value(), Tap::kAttentionNorm, 1);
    SelectorData& neurons = data.layers[0].neurons;
    std::fill(neurons.a.begin(), neurons.a.end(), int8_t{0});
    for (int32_t k = 0; k < neurons.rank; ++k) neurons.a[k * 16] = 127;
    std::fill(neurons.b.begin(), neurons.b.end(), int8_t{127});
    SetThresholds(0.0f, &neurons);
    data.layers[0].heads = {};
    data.layers[1].neurons = data.layers[1].heads = {};
    WritePredictorFor(directory_.path(), data, directory_.Path("predictor.safetensors"));
    EngineOptions options;
    options.model = directory_.path();
    engine_ = MakeEngine(options);
  }

  // That many requests together; `misses` says which tokens come.
  std::vector<Heard> Run(bool misses, int requests, int shadow_every = 1) {
    Request request = SparseRequest({misses ? 3 : 40}, kTokens + 1, {Tier::kFast, false, shadow_every});
    for (int32_t id = 0; id < 25; ++id) request.sampling.allowed_token_ids.push_back(misses ? id : 25 + id);
    return GenerateTogether(*engine_, std::vector<Request>(requests, request));
  }

  static constexpr int kFfn = 40;
  const ScratchDirectory directory_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(Fickle, ALayerFallsBackAndComesBack) {
  const SparsityReport good = Run(false, 1)[0].finish.sparsity;
  EXPECT_EQ(good.mlp_selected, 1.0);
  EXPECT_EQ(good.shadow.recall, 1.0);
  EXPECT_EQ(good.fallback_share, 0.0);

  const SparsityReport bad = Run(true, 1)[0].finish.sparsity;
  EXPECT_GT(bad.fallback_share, 0.0);
  EXPECT_LT(bad.fallback_share, 0.5);
  EXPECT_EQ(bad.shadow.recall, 0.0) << "shadow checks are about the prediction, fallen back or not";
  EXPECT_DOUBLE_EQ(bad.mlp_selected, 0.5 + bad.fallback_share);
  SparsityStats stats = engine_->sparsity_stats();
  ASSERT_EQ(stats.exact_now.size(), 1u);
  EXPECT_EQ(stats.exact_now[0].tier, Tier::kFast);
  EXPECT_EQ(stats.exact_now[0].layer, 0);

  EXPECT_DOUBLE_EQ(Run(true, 1)[0].finish.sparsity.fallback_share, 0.5) << "it stays while checks fail";
  const SparsityReport unseen = Run(true, 1, /*shadow_every=*/0)[0].finish.sparsity;
  EXPECT_DOUBLE_EQ(unseen.fallback_share, 0.5) << "and while nobody looks";

  Run(false, 24);
  stats = engine_->sparsity_stats();
  EXPECT_TRUE(stats.exact_now.empty());
  EXPECT_EQ(stats.layers[0].fallbacks, 1);
  EXPECT_EQ(stats.layers[0].recoveries, 1);
  EXPECT_EQ(Run(false, 1)[0].finish.sparsity.fallback_share, 0.0);
}

// Which layers ran EXACT in a step must not depend on what the step's own checks then found.
TEST_F(Fickle, TheFallbackShareIsThatOfTheStepsThatRanExact) {
  for (const Heard& heard : Run(true, 5)) {
    const SparsityReport& report = heard.finish.sparsity;
    EXPECT_GT(report.fallback_share, 0.0);
    EXPECT_DOUBLE_EQ(report.mlp_selected, 0.5 + report.fallback_share);
  }
}

// Any thread may ask, at any time.
TEST_F(Fickle, CountersCanBeReadWhileItRuns) {
  std::atomic<bool> done = false;
  std::thread reader([&] {
    int64_t last = 0;
    while (!done) {
      const SparsityStats stats = engine_->sparsity_stats();
      EXPECT_GE(stats.layers[0].shadow_rows, last);
      EXPECT_LE(stats.exact_now.size(), 1u);
      last = stats.layers[0].shadow_rows;
    }
  });
  for (const bool misses : {true, false, true}) Run(misses, 16);
  done = true;
  reader.join();
  EXPECT_EQ(engine_->sparsity_stats().layers[0].shadow_rows, 3 * 16 * kTokens);
}

}  // namespace
}  // namespace dejavu
