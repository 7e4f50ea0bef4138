// Tiers, reports and predictor files of the engine, through its public interface.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numeric>

#include "engine/model/predictor_file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/serving/embedded_engine.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// ---- EXACT and DENSE

TEST(EngineSparsity, ExactGivesTheTokensOfDenseOnAHundredPrompts) {
  const auto engine = MakeEngine();
  std::vector<Request> dense, mixed;
  for (const auto& prompt : TextPrompts()) {
    dense.push_back(SparseRequest(prompt, 24, {Tier::kDense, false, 0}));
    mixed.push_back(SparseRequest(prompt, 24, {Tier::kExact, false, 0}));
    // Every other one beside requests that skip more.
    if (mixed.size() % 4 == 0) mixed.push_back(SparseRequest(prompt, 12, {Tier::kFast, false, 0}));
  }
  const std::vector<Heard> expected = GenerateTogether(*engine, dense), heard = GenerateTogether(*engine, mixed);
  for (size_t i = 0, k = 0; i < heard.size(); ++i) {
    if (heard[i].finish.sparsity.tier == Tier::kExact) ExpectSameBits(heard[i], expected[k++]);
  }
  for (size_t i = 0; i < 100; i += 25) {
    ExpectSameBits(Generate(*engine, SparseRequest(TextPrompts()[i], 24, {Tier::kExact, false, 0})), expected[i]);
  }
}

TEST(EngineSparsity, ThresholdsAtMinusInfinityGiveTheTokensOfDense) {
  for (const char* name : {"pre-norm-hd80", "post-norm-350m-form"}) {
    EngineOptions options;
    options.model = CheckpointPath(name);
    PredictorData data = MakePredictor(OptConfig::Load(options.model).value(), Tap::kAttentionNorm, 1);
    for (LayerPredictorData& layer : data.layers) {
      SetThresholds(-INFINITY, &layer.neurons);
      SetThresholds(-INFINITY, &layer.heads);
    }
    const ScratchDirectory directory;
    options.predictor = WritePredictorFor(options.model, data, directory.Path("all.safetensors"));
    const auto engine = MakeEngine(options);
    std::vector<Request> requests;
    for (const Tier tier : kAllTiers) requests.push_back(SparseRequest({2, 30, 31, 32}, 20, {tier, false, 0}));
    const Heard dense = Generate(*engine, requests[0]);
    for (const Request& request : requests) ExpectSameBits(Generate(*engine, request), dense);
    for (const Heard& heard : GenerateTogether(*engine, requests)) ExpectSameBits(heard, dense);
  }
}

// ---- Deterministic requests

class DeterministicRequest : public testing::TestWithParam<Tier> {};

TEST_P(DeterministicRequest, GetsTheSameBitsAloneAndBesideFifteenOthers) {
  const auto engine = MakeEngine(WithoutFallback());
  const auto request = [&](bool deterministic) {
    Request r = SparseRequest(TextPrompts()[17], 30, {GetParam(), deterministic, 0});
    r.sampling.temperature = 0.9f;
    r.sampling.seed = 5;
    return r;
  };
  const auto beside_others = [&](const Request& r) {
    std::vector<std::shared_ptr<CollectingSink>> mates;
    std::vector<uint64_t> ids;
    const auto add_mate = [&] {
      const auto m = static_cast<int>(mates.size());
      mates.push_back(std::make_shared<CollectingSink>());
      Request mate = SparseRequest(TextPrompts()[20 + m], 300, {kAllTiers[m % 5], m % 7 == 3, m % 2});
      mate.sampling.temperature = 0.7f;
      ids.push_back(engine->Submit(mate, mates.back()).value());
    };
    for (int m = 0; m < 9; ++m) add_mate();
    for (const auto& mate : mates) mate->WaitForTokens(2);
    auto sink = std::make_shared<CollectingSink>();
    EXPECT_TRUE(engine->Submit(r, sink).ok());
    for (int m = 9; m < 15; ++m) add_mate();  // their prompts run beside it
    const Heard heard = Listen(*sink);
    for (const uint64_t id : ids) engine->Cancel(id);
    EXPECT_TRUE(engine->WaitIdle(SteadyTime::max()));
    return heard;
  };
  const Heard alone = Generate(*engine, request(true));
  ExpectSameBits(beside_others(request(true)), alone);
  ExpectSameBits(Generate(*engine, request(false)), alone);  // alone it makes no difference
  EXPECT_NE(beside_others(request(false)).logprobs, alone.logprobs) << "this test would not see what it is for";
}

INSTANTIATE_TEST_SUITE_P(PredictedTiers, DeterministicRequest, testing::ValuesIn(kPredictedTiers),
                         [](const auto& info) { return std::string(Name(info.param)); });

// ---- Reports

TEST(EngineSparsity, ReportsWhatWasRead) {
  const auto engine = MakeEngine();
  double density = 1.0;
  for (const Tier tier : kAllTiers) {
    const Heard heard = Generate(*engine, SparseRequest(TextPrompts()[3], 30, {tier, false, 0}));
    const SparsityReport& report = heard.finish.sparsity;
    EXPECT_EQ(report.tier, tier);
    EXPECT_EQ(report.decode_tokens, 29);
    EXPECT_EQ(report.shadow.tokens, 0);
    EXPECT_EQ(report.fallback_share, 0.0);
    EXPECT_EQ(report.head_density, 1.0) << "the shipped predictor chooses no heads";
    EXPECT_DOUBLE_EQ(report.mlp_density, (report.mlp_selected + report.mlp_active) / 2.0);
    EXPECT_DOUBLE_EQ(report.mlp_union_density, report.mlp_density) << "alone";
    if (tier <= Tier::kExact) {
      EXPECT_EQ(report.mlp_selected, 1.0);
    }
    if (tier == Tier::kDense) {
      EXPECT_EQ(report.mlp_active, 1.0);
    } else {
      EXPECT_LT(report.mlp_density, density) << Name(tier);
      EXPECT_LE(report.mlp_active, report.mlp_selected);
      EXPECT_GT(report.mlp_active, 0.0);
    }
    if (IsPredicted(tier)) {
      EXPECT_LT(report.mlp_density, 0.2);
    }
    density = report.mlp_density;
  }
}

TEST(EngineSparsity, ARequestThatNeverDecodesReportsNothing) {
  const auto engine = MakeEngine();
  Request score = SparseRequest(TextPrompts()[3], 0, {Tier::kFast, false, 1});
  score.score = true;
  for (const Request& request : {score, SparseRequest(TextPrompts()[3], 1, {Tier::kFast, false, 1})}) {
    const SparsityReport report = Generate(*engine, request).finish.sparsity;
    EXPECT_EQ(report.tier, Tier::kFast);
    EXPECT_EQ(report.decode_tokens, 0);
    EXPECT_EQ(report.mlp_density, 1.0);
    EXPECT_EQ(report.shadow.tokens, 0);
  }
}

// Selections of HIGH that do not depend on the input: layer l chooses 100 l + 1 neurons and l % 5 heads. Layer 3 has no
// point for its neurons, which is EXACT, and layer 7 chooses no heads. Nothing serves the other tiers.
PredictorData KnownSelection(const OptConfig& config) {
  PredictorData data = MakePredictor(config, Tap::kAttentionNorm, 2);
  const auto first = [](int32_t count) {
    std::vector<int32_t> list(count);
    std::iota(list.begin(), list.end(), 0);
    return list;
  };
  for (int32_t l = 0; l < config.layers; ++l) {
    SelectOnly(first(100 * l + 1), Tier::kHigh, &data.layers[l].neurons);
    SelectOnly(first(l % 5), Tier::kHigh, &data.layers[l].heads);
    for (const Tier other : {Tier::kBalanced, Tier::kFast}) {
      data.layers[l].neurons.points[static_cast<size_t>(other)].reset();
      data.layers[l].heads.points[static_cast<size_t>(other)].reset();
    }
  }
  data.layers[3].neurons.points[static_cast<size_t>(Tier::kHigh)].reset();
  data.layers[7].heads = {};
  data.tiers = {Tier::kHigh};
  return data;
}

TEST(EngineSparsity, DensitiesAreThoseOfAKnownSelection) {
  const OptConfig config = OptConfig::Load(EMBEDDED_MODEL).value();
  const auto neurons_of = [&](int32_t l) -> int64_t { return l == 3 ? config.ffn : 100 * l + 1; };
  const auto heads_of = [&](int32_t l) -> int64_t { return l == 7 ? config.heads : l % 5; };
  int64_t neurons = 0, heads = 0;
  for (int32_t l = 0; l < config.layers; ++l) {
    neurons += neurons_of(l);
    heads += heads_of(l);
  }
  const ScratchDirectory directory;
  const std::string path =
      WritePredictorFor(EMBEDDED_MODEL, KnownSelection(config), directory.Path("known.safetensors"));
  const auto engine = MakeEngine(WithPredictor(path));
  EXPECT_EQ(engine->predictor().path, path);
  EXPECT_EQ(engine->predictor().tap, "attention-norm");
  EXPECT_THAT(engine->predictor().tiers, ElementsAre(Tier::kHigh));
  EXPECT_GT(engine->predictor().bytes, 0);

  const std::vector<Request> requests(3, SparseRequest(TextPrompts()[4], 11, {Tier::kHigh, false, 0}));
  for (const Heard& heard : GenerateTogether(*engine, requests)) {
    const SparsityReport& report = heard.finish.sparsity;
    EXPECT_DOUBLE_EQ(report.mlp_selected, static_cast<double>(neurons) / (config.layers * config.ffn));
    EXPECT_DOUBLE_EQ(report.head_density, static_cast<double>(heads) / (config.layers * config.heads));
  }
  const SparsityStats stats = engine->sparsity_stats();
  for (int32_t l = 0; l < config.layers; ++l) {
    const LayerSparsityStats& layer = stats.layers[l];
    EXPECT_EQ(layer.rows, 30);
    EXPECT_EQ(layer.selected, 30 * neurons_of(l));
    EXPECT_EQ(layer.heads, 30 * heads_of(l));
    EXPECT_EQ(layer.union_selected, layer.steps * neurons_of(l)) << "steps that choose nothing here are not counted";
    EXPECT_EQ(layer.steps == 0, l == 3);
    EXPECT_LE(layer.union_active, layer.union_selected);
  }
  // Where the file has no point.
  EXPECT_TRUE(engine->CheckTier(Tier::kHigh).ok());
  const absl::Status missing = engine->CheckTier(Tier::kFast);
  EXPECT_EQ(missing.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(missing.message()),
              testing::AllOf(HasSubstr("fast"), testing::Not(HasSubstr(path))));  // tenants hear it
  const auto refused = engine->Submit(SparseRequest({2}, 1, {Tier::kBalanced, false, 0}), nullptr);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(EngineSparsity, InABatchTheUnionIsAtLeastWhatEachSelectsAndTheCountersAddUp) {
  const auto engine = MakeEngine(WithoutFallback());
  const ModelShape& config = engine->model();
  std::vector<Request> requests;
  for (int i = 0; i < 15; ++i) {
    requests.push_back(SparseRequest(TextPrompts()[i], 25, {kPredictedTiers[i % 3], i % 5 == 0, /*shadow_every=*/4}));
  }
  requests.push_back(SparseRequest(TextPrompts()[15], 25, {Tier::kExact, false, 1}));
  double selected = 0, active = 0, heads = 0, agreements = 0, kl = 0;
  int64_t tokens = 0, shadow_tokens = 0;
  for (const Heard& heard : GenerateTogether(*engine, requests)) {
    const SparsityReport& report = heard.finish.sparsity;
    EXPECT_GE(report.mlp_union_density, report.mlp_density);
    EXPECT_LE(report.mlp_union_density, 1.0);
    if (!IsPredicted(report.tier)) continue;
    EXPECT_GT(report.mlp_union_density, 1.5 * report.mlp_density);
    const double neurons = static_cast<double>(report.decode_tokens) * config.layers * config.ffn;
    tokens += report.decode_tokens;
    selected += report.mlp_selected * neurons;
    active += report.mlp_active * neurons;
    heads += report.head_density * static_cast<double>(report.decode_tokens) * config.layers * config.heads;
    shadow_tokens += report.shadow.tokens;
    agreements += report.shadow.top1_agreement * static_cast<double>(report.shadow.tokens);
    kl += report.shadow.kl_nats * static_cast<double>(report.shadow.tokens);
  }
  const SparsityStats stats = engine->sparsity_stats();
  LayerSparsityStats sum;
  for (const LayerSparsityStats& layer : stats.layers) {
    EXPECT_EQ(layer.rows, tokens);
    EXPECT_EQ(layer.shadow_rows, shadow_tokens);
    EXPECT_LE(layer.shadow_hits, std::min(layer.shadow_active, layer.shadow_selected));
    EXPECT_GE(layer.shadow_mass, layer.shadow_missed_mass);
    EXPECT_LE(layer.steps, engine->stats().steps);
    sum.selected += layer.selected;
    sum.active += layer.active;
    sum.heads += layer.heads;
  }
  EXPECT_NEAR(static_cast<double>(sum.selected), selected, 0.5);
  EXPECT_NEAR(static_cast<double>(sum.active), active, 0.5);
  EXPECT_NEAR(static_cast<double>(sum.heads), heads, 0.5);
  EXPECT_EQ(stats.shadow_tokens, shadow_tokens);
  EXPECT_NEAR(static_cast<double>(stats.shadow_agreements), agreements, 1e-6);
  EXPECT_NEAR(stats.shadow_kl_nats, kl, 1e-9);
  EXPECT_THAT(stats.exact_now, IsEmpty());
}

// ---- Predictor files

TEST(EngineSparsity, WithoutAPredictorPredictedTiersAreRefused) {
  const auto engine = MakeEngine(WithPredictor("none"));
  EXPECT_EQ(engine->predictor().path, "");
  EXPECT_EQ(engine->predictor().bytes, 0);
  for (const Tier tier : kPredictedTiers) {
    const absl::Status status = engine->CheckTier(tier);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()),
                testing::AllOf(HasSubstr(std::string(Name(tier))), HasSubstr("predictor")));
    const auto submitted = engine->Submit(SparseRequest({2, 5}, 2, {tier, false, 0}), nullptr);
    EXPECT_EQ(submitted.status().code(), absl::StatusCode::kFailedPrecondition);
  }
  const auto with = MakeEngine();
  for (const Tier tier : {Tier::kDense, Tier::kExact}) {
    const Request request = SparseRequest(TextPrompts()[5], 20, {tier, false, /*shadow_every=*/1});
    const Heard heard = Generate(*engine, request);
    EXPECT_EQ(heard.finish.sparsity.shadow.tokens, 0);
    ExpectSameBits(heard, Generate(*with, request));
  }
  EXPECT_EQ(engine->sparsity_stats().layers.size(), 8u);
  EXPECT_EQ(engine->sparsity_stats().layers[0].rows, 0);
}

TEST(EngineSparsity, AFileThatIsNotThisModelsIsRefusedWithTheReason) {
  const ScratchDirectory directory;
  const auto refusal = [&](const std::string& path) {
    EngineOptions options = WithPredictor(path);
    options.model = EMBEDDED_MODEL;
    const auto engine = Engine::Create(options, 0, nullptr);
    EXPECT_FALSE(engine.ok());
    EXPECT_THAT(std::string(engine.status().message()), HasSubstr(path));
    return std::string(engine.status().message());
  };
  const OptConfig config = OptConfig::Load(EMBEDDED_MODEL).value();
  PredictorData data = MakePredictor(config, Tap::kMlpNorm, 3);
  data.weights_hash = "sha256:0123";
  ASSERT_TRUE(WritePredictor(data, config, directory.Path("other")).ok());
  EXPECT_THAT(refusal(directory.Path("other")), HasSubstr("other weights"));

  const std::string small = CheckpointPath("pre-norm-hd64");
  WritePredictorFor(small, MakePredictor(OptConfig::Load(small).value(), Tap::kMlpNorm, 3), directory.Path("small"));
  EXPECT_THAT(refusal(directory.Path("small")), HasSubstr("layers = 2; this one has 8"));

  const std::string whole = WritePredictorFor(EMBEDDED_MODEL, data, directory.Path("whole"));
  std::filesystem::copy_file(whole, directory.Path("truncated"));
  std::filesystem::resize_file(directory.Path("truncated"), std::filesystem::file_size(whole) - 1);
  refusal(directory.Path("truncated"));
  refusal(directory.Path("absent"));
}

}  // namespace
}  // namespace dejavu
