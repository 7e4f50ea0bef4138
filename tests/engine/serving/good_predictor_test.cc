// The predictor that ships with the embedded model, over text that it was not calibrated on.
#include <cstdio>

#include "gtest/gtest.h"
#include "tests/engine/serving/embedded_engine.h"

namespace dejavu {
namespace {

TEST(GoodPredictor, NeverTriggersAFallbackOverTwentyThousandShadowTokens) {
  const auto engine = MakeEngine();
  std::vector<Request> requests;
  for (int i = 0; i < 100; ++i) {
    const Tier tier = kAllTiers[2 + i % 3];
    Request request = SparseRequest(TextPrompts()[i], 204, {tier, i % 2 == 0, /*shadow_every=*/1});
    request.sampling.temperature = i % 4 == 0 ? 0.0f : 0.8f;
    request.sampling.seed = i;
    request.logprobs = false;
    requests.push_back(request);
  }
  ShadowReport sums[kAllTiers.size()];
  for (const Heard& heard : GenerateTogether(*engine, requests)) {
    const SparsityReport& report = heard.finish.sparsity;
    const auto tokens = static_cast<double>(report.shadow.tokens);
    EXPECT_EQ(report.shadow.tokens, report.decode_tokens);
    ShadowReport& sum = sums[static_cast<size_t>(report.tier)];
    sum.tokens += report.shadow.tokens;
    sum.top1_agreement += report.shadow.top1_agreement * tokens;
    sum.kl_nats += report.shadow.kl_nats * tokens;
    sum.recall += report.shadow.recall * tokens;
    sum.missed_mass += report.shadow.missed_mass * tokens;
  }
  const SparsityStats stats = engine->sparsity_stats();
  EXPECT_GE(stats.shadow_tokens, 20000);
  EXPECT_TRUE(stats.exact_now.empty());
  for (size_t l = 0; l < stats.layers.size(); ++l) EXPECT_EQ(stats.layers[l].fallbacks, 0) << "layer " << l;
  for (const Tier tier : {Tier::kHigh, Tier::kBalanced, Tier::kFast}) {
    const ShadowReport& sum = sums[static_cast<size_t>(tier)];
    const auto tokens = static_cast<double>(sum.tokens);
    std::printf("%-8s %6d tokens: agreement %.4f, KL %.5f nats, recall %.4f, missed mass %.5f\n",
                std::string(Name(tier)).c_str(), static_cast<int>(sum.tokens), sum.top1_agreement / tokens,
                sum.kl_nats / tokens, sum.recall / tokens, sum.missed_mass / tokens);
    EXPECT_GT(sum.top1_agreement / tokens, 0.9);
  }
}

}  // namespace
}  // namespace dejavu
