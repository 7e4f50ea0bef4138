// Tiers, reports and shadow checks of the engine, through its public interface.
#include <algorithm>
#include <bit>
#include <cmath>
#include <filesystem>
#include <numeric>

#include "engine/ranks/model_runner.h"
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

constexpr Tier kPredictedTiers[] = {Tier::kHigh, Tier::kBalanced, Tier::kFast};

void ExpectSameBits(const Heard& a, const Heard& b) {
  EXPECT_EQ(a.ids, b.ids);
  ASSERT_EQ(a.logprobs.size(), b.logprobs.size());
  for (size_t i = 0; i < a.logprobs.size(); ++i) {
    EXPECT_EQ(std::bit_cast<uint32_t>(a.logprobs[i]), std::bit_cast<uint32_t>(b.logprobs[i])) << "token " << i;
  }
}

// Shadow checks report and change nothing.
EngineOptions WithoutFallback() {
  EngineOptions options;
  options.shadow_fallback = false;
  return options;
}

EngineOptions WithPredictor(const std::string& path) {
  EngineOptions options;
  options.predictor = path;
  return options;
}

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

// Selections that do not depend on the input: every share is known.
TEST(EngineSparsity, DensitiesAreThoseOfAKnownSelection) {
  const OptConfig config = OptConfig::Load(EMBEDDED_MODEL).value();
  PredictorData data = MakePredictor(config, Tap::kAttentionNorm, 2);
  const auto first = [](int32_t count) {
    std::vector<int32_t> list(count);
    std::iota(list.begin(), list.end(), 0);
    return list;
  };
  int64_t neurons = 0, heads = 0;
  for (int32_t l = 0; l < config.layers; ++l) {
    SelectorData& from = data.layers[l].neurons;
    SelectOnly(first(100 * l + 1), Tier::kHigh, &from);
    SelectOnly(first(l % 5), Tier::kHigh, &data.layers[l].heads);
    from.points[static_cast<size_t>(Tier::kBalanced)].reset();
    from.points[static_cast<size_t>(Tier::kFast)].reset();
    neurons += 100 * l + 1;
    heads += l % 5;
  }
  data.layers[3].neurons.points[static_cast<size_t>(Tier::kHigh)].reset();  // EXACT
  neurons += config.ffn - 301;
  data.layers[7].heads = {};
  heads += config.heads - 7 % 5;
  data.tiers = {Tier::kHigh};
  for (LayerPredictorData& layer : data.layers) {
    layer.heads.points[static_cast<size_t>(Tier::kBalanced)].reset();
    layer.heads.points[static_cast<size_t>(Tier::kFast)].reset();
  }
  const ScratchDirectory directory;
  const std::string path = WritePredictorFor(EMBEDDED_MODEL, data, directory.Path("known.safetensors"));
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
    const int64_t selected = l == 3 ? config.ffn : 100 * l + 1;
    EXPECT_EQ(layer.rows, 30);
    EXPECT_EQ(layer.selected, 30 * selected);
    EXPECT_EQ(layer.heads, 30 * (l == 7 ? config.heads : l % 5));
    EXPECT_EQ(layer.union_selected, layer.steps * selected) << "steps that choose nothing here are not counted";
    EXPECT_EQ(layer.steps == 0, l == 3);
    EXPECT_LE(layer.union_active, layer.union_selected);
  }
  // Where the file has no point.
  EXPECT_TRUE(engine->CheckTier(Tier::kHigh).ok());
  const absl::Status missing = engine->CheckTier(Tier::kFast);
  EXPECT_EQ(missing.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(missing.message()), testing::AllOf(HasSubstr("fast"), HasSubstr(path)));
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

// The same stream through ModelRunner: before each decode step the dense row, then the real one.
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

      Batch& batch = runner->StartBatch();
      for (size_t i = 0; i < prompt.size(); ++i) batch.AddRow(0, static_cast<int32_t>(i), prompt[i], false);
      runner->Run();
      double tokens = 0, agreements = 0, kl = 0, fields[kAuditFields] = {};
      for (size_t k = 1; k < heard.ids.size(); ++k) {
        const auto position = static_cast<int32_t>(prompt.size() + k - 1);
        runner->StartBatch().AddRow(0, position, heard.ids[k - 1], true, Tier::kDense);
        const absl::Span<const float> run = runner->Run();
        const std::vector<float> dense(run.begin(), run.end());
        runner->StartBatch().AddDecodeRow(0, position, heard.ids[k - 1], true, {tier, false, 0});
        batch.audit_rows = {0};
        const absl::Span<const float> sparse = runner->Run();
        if ((k + id) % every != 0) continue;
        ++tokens;
        agreements += std::max_element(dense.begin(), dense.end()) - dense.begin() ==
                      std::max_element(sparse.begin(), sparse.end()) - sparse.begin();
        double p_sum = 0, q_sum = 0;
        for (size_t i = 0; i < dense.size(); ++i) {
          p_sum += std::exp(double{dense[i]});
          q_sum += std::exp(double{sparse[i]});
        }
        for (size_t i = 0; i < dense.size(); ++i) {
          const double log_p = dense[i] - std::log(p_sum), log_q = sparse[i] - std::log(q_sum);
          kl += std::exp(log_p) * (log_p - log_q);
        }
        for (int32_t l = 0; l < config.layers; ++l) {
          for (int f = 0; f < kAuditFields; ++f) fields[f] += runner->counts().audit_of(l, 0)[f];
        }
      }
      const ShadowReport& shadow = heard.finish.sparsity.shadow;
      EXPECT_EQ(static_cast<double>(shadow.tokens), tokens);
      EXPECT_NEAR(shadow.top1_agreement, agreements / tokens, 1e-12);
      EXPECT_NEAR(shadow.kl_nats, kl / tokens, 1e-6);
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
      // Alone and at every token, what was selected is what was compared.
      if (every == 1) {
        const double neurons = tokens * config.layers * config.ffn;
        EXPECT_NEAR(heard.finish.sparsity.mlp_selected, fields[kAuditSelected] / neurons, 1e-12);
        EXPECT_NEAR(heard.finish.sparsity.mlp_active, fields[kAuditHits] / neurons, 0.1 * fields[kAuditHits] / neurons);
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

  // Mean agreement of eight texts of 40 tokens, all compared, whoever runs beside whom.
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
