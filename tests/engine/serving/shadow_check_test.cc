// Shadow checks through the engine's public interface: what they report, and the layers that then fall back to EXACT.
#include <algorithm>
#include <cmath>

#include "engine/ranks/model_runner.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/serving/embedded_engine.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

// ---- Shadow checks

// Of the decode steps of a request, those that one in `every` picks: 1 ... tokens - 1 tokens have been generated
// before.
int64_t ShadowTokens(uint64_t id, int tokens, int every) {
  int64_t count = 0;
  for (int generated = 1; generated < tokens; ++generated) count += (generated + id) % every == 0;
  return count;
}

TEST(EngineSparsity, ShadowChecksChangeNoTokenAndAreAsManyAsAskedFor) {
  const auto engine = MakeEngine(WithoutFallback());
  constexpr int kTokens = 30;
  for (const Tier tier : kPredictedTiers) {
    Heard without;
    for (const int every : {0, 1, 3, 1000}) {
      auto sink = std::make_shared<CollectingSink>();
      const auto id = engine->Submit(SparseRequest(TextPrompts()[6], kTokens, {tier, false, every}), sink);
      ASSERT_TRUE(id.ok());
      const Heard heard = Listen(*sink);
      if (every == 0) without = heard;
      ExpectSameBits(heard, without);
      const ShadowReport& shadow = heard.finish.sparsity.shadow;
      EXPECT_EQ(shadow.tokens, every == 0 ? 0 : ShadowTokens(*id, kTokens, every)) << "one in " << every;
    }
  }
}

// Of the decode steps that are compared.
struct Comparison {
  double tokens = 0, agreements = 0, kl_nats = 0;
  double fields[kAuditFields] = {};
};

double KlNats(absl::Span<const float> dense, absl::Span<const float> sparse) {
  double p_sum = 0, q_sum = 0, kl = 0;
  for (size_t i = 0; i < dense.size(); ++i) {
    p_sum += std::exp(double{dense[i]});
    q_sum += std::exp(double{sparse[i]});
  }
  for (size_t i = 0; i < dense.size(); ++i) {
    const double log_p = dense[i] - std::log(p_sum), log_q = sparse[i] - std::log(q_sum);
    kl += std::exp(log_p) * (log_p - log_q);
  }
  return kl;
}

// The stream that request `id` of the engine got, through ModelRunner: before each decode step the dense row, then the
// real one.
Comparison CompareWithDense(ModelRunner& runner, const std::vector<int32_t>& prompt, const std::vector<int32_t>& ids,
                            uint64_t id, Tier tier, int every) {
  Batch& batch = runner.StartBatch();
  for (size_t i = 0; i < prompt.size(); ++i) batch.AddRow(0, static_cast<int32_t>(i), prompt[i], false);
  runner.Run();
  Comparison sum;
  for (size_t k = 1; k < ids.size(); ++k) {
    const auto position = static_cast<int32_t>(prompt.size() + k - 1);
    runner.StartBatch().AddRow(0, position, ids[k - 1], true, Tier::kDense);
    const absl::Span<const float> run = runner.Run();
    const std::vector<float> dense(run.begin(), run.end());
    runner.StartBatch().AddDecodeRow(0, position, ids[k - 1], true, {tier, false, 0});
    batch.audit_rows = {0};
    const absl::Span<const float> sparse = runner.Run();
    if ((k + id) % every != 0) continue;
    ++sum.tokens;
    sum.agreements += std::max_element(dense.begin(), dense.end()) - dense.begin() ==
                      std::max_element(sparse.begin(), sparse.end()) - sparse.begin();
    sum.kl_nats += KlNats(dense, sparse);
    for (int32_t l = 0; l < runner.config().layers; ++l) {
      for (int f = 0; f < kAuditFields; ++f) sum.fields[f] += runner.counts().audit_of(l, 0)[f];
    }
  }
  return sum;
}

void ExpectReport(const ShadowReport& shadow, const Comparison& expected) {
  const auto& fields = expected.fields;
  EXPECT_EQ(static_cast<double>(shadow.tokens), expected.tokens);
  EXPECT_NEAR(shadow.top1_agreement, expected.agreements / expected.tokens, 1e-12);
  EXPECT_NEAR(shadow.kl_nats, expected.kl_nats / expected.tokens, 1e-6);
  EXPECT_GT(shadow.kl_nats, 0.0);
  EXPECT_NEAR(shadow.recall, fields[kAuditHits] / fields[kAuditActive], 1e-12);
  EXPECT_NEAR(shadow.precision, fields[kAuditHits] / fields[kAuditSelected], 1e-12);
  EXPECT_NEAR(shadow.missed_mass, fields[kAuditMissedMass] / fields[kAuditMass], 1e-9);
  EXPECT_GT(shadow.recall, 0.5);
  EXPECT_LE(shadow.recall, 1.0);
  EXPECT_GT(shadow.precision, 0.2);
  EXPECT_LE(shadow.precision, 1.0);
  EXPECT_GT(shadow.missed_mass, 0.0);
  EXPECT_LT(shadow.missed_mass, 0.2);
}

TEST(EngineSparsity, ShadowReportsAreWhatADenseRunBesideTheSparseOneGives) {
  const auto engine = MakeEngine(WithoutFallback());
  const PredictorData data = ReadPredictorOf(EMBEDDED_MODEL);
  ModelRunner::Options options;
  options.model = EMBEDDED_MODEL;
  options.threads = 2;
  options.max_rows = 128;
  options.max_audits = 1;
  const auto runner = ModelRunner::Create(options, nullptr).value();
  ASSERT_TRUE(runner->SetPredictor(&data).ok());
  const OptConfig& config = runner->config();
  for (const Tier tier : kPredictedTiers) {
    for (const int every : {1, 3}) {
      const std::vector<int32_t>& prompt = TextPrompts()[8];
      Request request = SparseRequest(prompt, 20, {tier, false, every});
      request.sampling.temperature = 1.0f;
      auto sink = std::make_shared<CollectingSink>();
      const uint64_t id = engine->Submit(request, sink).value();
      const Heard heard = Listen(*sink);
      const Comparison expected = CompareWithDense(*runner, prompt, heard.ids, id, tier, every);
      const SparsityReport& report = heard.finish.sparsity;
      ExpectReport(report.shadow, expected);
      // Alone and at every token, what was selected is what was compared.
      if (every == 1) {
        const double neurons = expected.tokens * config.layers * config.ffn;
        const double hits = expected.fields[kAuditHits] / neurons;
        EXPECT_NEAR(report.mlp_selected, expected.fields[kAuditSelected] / neurons, 1e-12);
        EXPECT_NEAR(report.mlp_active, hits, 0.1 * hits);
      }
    }
  }
}

TEST(EngineSparsity, ShadowResultsOfAPerfectPredictionArePerfect) {
  const OptConfig config = OptConfig::Load(EMBEDDED_MODEL).value();
  PredictorData data = MakePredictor(config, Tap::kMlpNorm, 4);
  for (LayerPredictorData& layer : data.layers) SetThresholds(-INFINITY, &layer.neurons);
  const ScratchDirectory directory;
  const auto engine = MakeEngine(WithPredictor(WritePredictorFor(EMBEDDED_MODEL, data, directory.Path("all"))));
  const ShadowReport shadow =
      Generate(*engine, SparseRequest(TextPrompts()[9], 20, {Tier::kFast, false, 1})).finish.sparsity.shadow;
  EXPECT_EQ(shadow.tokens, 19);
  EXPECT_EQ(shadow.top1_agreement, 1.0);
  EXPECT_EQ(shadow.kl_nats, 0.0);
  EXPECT_EQ(shadow.recall, 1.0);
  EXPECT_LT(shadow.precision, 0.5);
  EXPECT_EQ(shadow.missed_mass, 0.0);
}

// ---- Falling back

// The shipped predictor with noise for stage B in two layers.
constexpr int32_t kSpoiled[] = {2, 6};

class SpoiledPredictor : public testing::TestWithParam<Tier> {
 protected:
  SpoiledPredictor() {
    PredictorData data = ReadPredictorOf(EMBEDDED_MODEL);
    for (const int32_t layer : kSpoiled) Spoil(layer, &data);
    path_ = WritePredictorFor(EMBEDDED_MODEL, data, directory_.Path("spoiled"));
  }

  // Mean agreement of eight texts of 40 tokens, all compared, whichever run side by side.
  double Agreement(Engine& engine, int first) const {
    std::vector<Request> requests;
    for (int i = first; i < first + 8; ++i)
      requests.push_back(SparseRequest(TextPrompts()[i], 41, {GetParam(), /*deterministic=*/true, 1}));
    double sum = 0;
    for (const Heard& heard : GenerateTogether(engine, requests)) sum += heard.finish.sparsity.shadow.top1_agreement;
    return sum / 8;
  }

  const ScratchDirectory directory_;
  std::string path_;
};

TEST_P(SpoiledPredictor, RunsExactInThoseLayersFromThenOn) {
  const auto engine = MakeEngine(WithPredictor(path_));
  EngineOptions options = WithoutFallback();
  options.predictor = path_;
  const auto stubborn = MakeEngine(options);

  const double bad = Agreement(*stubborn, 40);
  Agreement(*engine, 30);  // enough to see it
  const double recovered = Agreement(*engine, 40), good = Agreement(*MakeEngine(), 40);
  EXPECT_LT(bad, 0.8) << "spoiled enough to tell";
  EXPECT_GT(recovered, bad + 0.1);
  EXPECT_GE(recovered, good - 0.02);

  const SparsityStats stats = engine->sparsity_stats();
  std::vector<int32_t> exact;
  for (const SparsityStats::Fallback& fallback : stats.exact_now) {
    EXPECT_EQ(fallback.tier, GetParam());
    exact.push_back(fallback.layer);
  }
  EXPECT_THAT(exact, ElementsAre(kSpoiled[0], kSpoiled[1]));
  // A sound layer may fall back, too, while it is fed by a spoiled one; it recovers when that one runs exact.
  for (int32_t l = 0; l < 8; ++l) {
    const LayerSparsityStats& layer = stats.layers[l];
    if (l == kSpoiled[0] || l == kSpoiled[1]) {
      EXPECT_EQ(layer.fallbacks, 1) << "layer " << l;
      EXPECT_EQ(layer.recoveries, 0) << "layer " << l;
    } else {
      EXPECT_EQ(layer.recoveries, layer.fallbacks) << "layer " << l;
    }
  }
  // What is exact computes everything, and the report says so; other tiers go on as they were.
  const SparsityReport report =
      Generate(*engine, SparseRequest(TextPrompts()[50], 20, {GetParam(), false, 0})).finish.sparsity;
  EXPECT_DOUBLE_EQ(report.fallback_share, 2.0 / 8.0);
  EXPECT_GT(report.mlp_selected, 2.0 / 8.0);
  const Tier other = GetParam() == Tier::kFast ? Tier::kHigh : Tier::kFast;
  EXPECT_EQ(Generate(*engine, SparseRequest(TextPrompts()[50], 8, {other, false, 0})).finish.sparsity.fallback_share,
            0.0);

  EXPECT_THAT(stubborn->sparsity_stats().exact_now, IsEmpty());
  for (const LayerSparsityStats& layer : stubborn->sparsity_stats().layers) EXPECT_EQ(layer.fallbacks, 0);
  EXPECT_GT(stubborn->sparsity_stats().layers[kSpoiled[0]].shadow_missed_mass, 0.0);
}

INSTANTIATE_TEST_SUITE_P(PredictedTiers, SpoiledPredictor, testing::ValuesIn(kPredictedTiers),
                         [](const auto& info) { return std::string(Name(info.param)); });

}  // namespace
}  // namespace dejavu
