#include "engine/eval/evaluation.h"

#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/eval/report.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/engine/golden.h"
#include "tests/engine/random_predictor.h"
#include "tests/engine/tiny_checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const std::vector<Tier> kEveryTier(kAllTiers.begin(), kAllTiers.end());

// TinyCheckpoint's shape, in bytes: everything is float32.
constexpr int kLayers = 2, kHidden = 16, kFfn = 40, kHeads = 2, kVocab = 50, kFloat = 4;
constexpr int kWindow = 12;
constexpr int kUpRow = (kHidden + 1) * kFloat, kDownRow = kHidden * kFloat, kDownBias = kHidden * kFloat;
constexpr int kDenseMlp = kFfn * (kUpRow + kDownRow) + kDownBias;

std::unique_ptr<ModelRunner> RunnerFor(const std::string& model, int slots, int max_rows, int window,
                                       const std::string& kv_dtype = "fp16") {
  ModelRunner::Options options;
  options.kv_dtype = kv_dtype;
  options.model = model;
  options.threads = 1;
  options.slots = slots;
  options.max_rows = options.max_audits = max_rows;
  options.window = window;
  return *ModelRunner::Create(options, nullptr);
}

class EvaluationTest : public testing::Test {
 protected:
  EvaluationTest() {
    checkpoint_.Write(directory_);
    config_ = *OptConfig::Load(directory_.path());
    predictor_ = RandomPredictor(config_, "", 3);
    std::mt19937 random(4);
    for (int i = 0; i < 7 * kWindow + 5; ++i) tokens_.push_back(static_cast<int32_t>(random() % kVocab));
  }

  absl::StatusOr<Evaluation> TryEvaluate(const EvaluationOptions& options, int slots = 1, int max_rows = 64) const {
    const auto runner = RunnerFor(directory_.path(), slots, max_rows, kWindow);
    return dejavu::Evaluate(*runner, with_predictor_ ? &predictor_ : nullptr, tokens_, options, nullptr);
  }
  Evaluation Evaluate(const EvaluationOptions& options, int slots = 1, int max_rows = 64) const {
    const auto evaluation = TryEvaluate(options, slots, max_rows);
    EXPECT_TRUE(evaluation.ok()) << evaluation.status();
    return *evaluation;
  }

  const ScratchDirectory directory_;
  const TinyCheckpoint checkpoint_ = TinyCheckpoint::Random(1);
  OptConfig config_;
  PredictorData predictor_;
  bool with_predictor_ = true;
  std::vector<int32_t> tokens_;
};

void ExpectSameReads(const ReadFigures& a, const ReadFigures& b) {
  EXPECT_EQ(a.mlp_selected, b.mlp_selected);
  EXPECT_EQ(a.mlp_active, b.mlp_active);
  EXPECT_EQ(a.mlp_own_selected, b.mlp_own_selected);
  EXPECT_EQ(a.head_density, b.head_density);
  EXPECT_EQ(a.mlp_byte_share, b.mlp_byte_share);
  EXPECT_EQ(a.recall, b.recall);
  EXPECT_EQ(a.precision, b.precision);
  EXPECT_NEAR(a.missed_mass, b.missed_mass, 1e-9);
}

// Perplexity and KL are sums in the order of the rows.
void ExpectSame(const Evaluation& a, const Evaluation& b, double relative) {
  EXPECT_EQ(a.tokens, b.tokens);
  ASSERT_EQ(a.tiers.size(), b.tiers.size());
  for (size_t i = 0; i < a.tiers.size(); ++i) {
    SCOPED_TRACE(std::string(Name(a.tiers[i].tier)));
    EXPECT_EQ(a.tiers[i].tier, b.tiers[i].tier);
    EXPECT_NEAR(a.tiers[i].perplexity, b.tiers[i].perplexity, relative * a.tiers[i].perplexity);
    EXPECT_NEAR(a.tiers[i].kl_nats, b.tiers[i].kl_nats, relative * a.tiers[i].kl_nats);
    EXPECT_EQ(a.tiers[i].top1_agreement, b.tiers[i].top1_agreement);
    EXPECT_EQ(a.tiers[i].weight_bytes_per_token, b.tiers[i].weight_bytes_per_token);
    ExpectSameReads(a.tiers[i].mean, b.tiers[i].mean);
    for (int l = 0; l < kLayers; ++l) ExpectSameReads(a.tiers[i].layers[l], b.tiers[i].layers[l]);
  }
}

// Against logits that Hugging Face Transformers computed: which logits score which token.
TEST(Evaluation, PerplexityIsThatOfTransformers) {
  for (const std::string& name : GoldenCheckpoints()) {
    for (const Golden& golden : LoadGoldens(name)) {
      const auto tokens = static_cast<int>(golden.prompt.size());
      if (tokens < 2) continue;
      const size_t vocab = golden.logits.size() / tokens;
      double loss = 0.0;
      for (int i = 0; i + 1 < tokens; ++i) {
        const float* const logits = &golden.logits[i * vocab];
        double sum = 0.0;
        for (size_t v = 0; v < vocab; ++v) sum += std::exp(double{logits[v]});
        loss += std::log(sum) - logits[golden.prompt[i + 1]];
      }
      const auto runner = RunnerFor(CheckpointPath(name), 1, 5, tokens, "fp32");
      const auto evaluation = Evaluate(*runner, nullptr, golden.prompt, {{Tier::kDense}, false}, nullptr);
      ASSERT_TRUE(evaluation.ok()) << evaluation.status();
      EXPECT_EQ(evaluation->tokens, tokens - 1);
      const double expected = std::exp(loss / (tokens - 1));
      EXPECT_NEAR(evaluation->tiers[0].perplexity, expected, 2e-5 * expected) << name << ", " << tokens << " tokens";
    }
  }
}

TEST_F(EvaluationTest, ExactIsDenseAndReadsOnlyWhatIsNotZero) {
  with_predictor_ = false;
  const Evaluation e = Evaluate({{Tier::kDense, Tier::kExact}, false});
  const TierEvaluation &dense = e.tiers[0], &exact = e.tiers[1];
  EXPECT_EQ(e.tokens, 7 * (kWindow - 1) + 4);
  EXPECT_EQ(exact.perplexity, dense.perplexity);
  EXPECT_EQ(exact.perplexity_change, 0.0);
  EXPECT_EQ(exact.top1_agreement, 1.0);
  EXPECT_NEAR(exact.kl_nats, 0.0, 1e-15);
  EXPECT_EQ(dense.mean.mlp_density(), 1.0);
  EXPECT_EQ(dense.mean.mlp_byte_share, 1.0);
  EXPECT_EQ(dense.byte_ceiling, 1.0);
  EXPECT_EQ(exact.mean.mlp_selected, 1.0);
  EXPECT_GT(exact.mean.mlp_active, 0.3);  // random weights: about half
  EXPECT_LT(exact.mean.mlp_active, 0.7);
  EXPECT_GT(exact.byte_ceiling, 1.0);
  for (const TierEvaluation* tier : {&dense, &exact}) {
    EXPECT_EQ(tier->mean.recall, 1.0);
    EXPECT_EQ(tier->mean.missed_mass, 0.0);
    EXPECT_EQ(tier->mean.precision, exact.mean.mlp_active);
    EXPECT_EQ(tier->mean.head_density, 1.0);
  }
}

TEST_F(EvaluationTest, ThresholdsOfMinusInfinityGiveTheNumbersOfDense) {
  SetThresholds(-kInfinity, &predictor_);
  const Evaluation e = Evaluate({kEveryTier, false});
  const TierEvaluation &dense = e.tiers[0], &exact = e.tiers[1];
  for (size_t i = 2; i < e.tiers.size(); ++i) {
    const TierEvaluation& tier = e.tiers[i];
    EXPECT_EQ(tier.perplexity, dense.perplexity) << Name(tier.tier);
    EXPECT_EQ(tier.top1_agreement, 1.0);
    EXPECT_NEAR(tier.kl_nats, 0.0, 1e-15);
    EXPECT_EQ(tier.mean.mlp_selected, 1.0);
    EXPECT_EQ(tier.mean.mlp_active, exact.mean.mlp_active);
    EXPECT_EQ(tier.mean.head_density, 1.0);
    EXPECT_EQ(tier.mean.recall, 1.0);
    EXPECT_EQ(tier.mean.missed_mass, 0.0);
    EXPECT_EQ(tier.mean.precision, exact.mean.precision);
    EXPECT_GT(tier.mean.mlp_byte_share, exact.mean.mlp_byte_share) << "the predictor is read too";
    EXPECT_LT(tier.byte_ceiling, exact.byte_ceiling);
  }
}

TEST_F(EvaluationTest, RisingThresholdsReadLessAndMissMore) {
  const Evaluation e = Evaluate({kEveryTier, false});
  for (size_t i = 2; i < e.tiers.size(); ++i) {
    const TierEvaluation &tier = e.tiers[i], &better = e.tiers[i - 1];
    EXPECT_LT(tier.mean.mlp_selected, better.mean.mlp_selected) << Name(tier.tier);
    EXPECT_LT(tier.mean.recall, better.mean.recall);
    EXPECT_GT(tier.mean.missed_mass, better.mean.missed_mass);
    EXPECT_NE(tier.perplexity, better.perplexity);
    EXPECT_GT(tier.kl_nats, 1e-6);
    EXPECT_LT(tier.top1_agreement, 1.0);
    EXPECT_EQ(tier.perplexity_change, tier.perplexity / e.tiers[0].perplexity - 1.0);
    // What is selected and not zero is what the down-projection reads.
    EXPECT_NEAR(tier.mean.precision, tier.mean.mlp_active / tier.mean.mlp_selected, 1e-9);
  }
}

TEST_F(EvaluationTest, HeadsAreCountedWhereTheyAreChosen) {
  const Evaluation e = Evaluate({kEveryTier, false});
  for (int i = 0; i < 3; ++i) EXPECT_EQ(e.tiers[i].mean.head_density, 1.0);
  EXPECT_GT(e.tiers[3].mean.head_density, e.tiers[4].mean.head_density);
  EXPECT_GT(e.tiers[4].mean.head_density, 0.1);
  EXPECT_LT(e.tiers[4].mean.head_density, 0.9);
  const Evaluation together = Evaluate({{Tier::kFast}, true}, 3, 3);
  EXPECT_GT(together.tiers[0].mean.head_density, e.tiers[4].mean.head_density);
}

// The first layer sees what it sees in DENSE, so what it misses is known.
TEST_F(EvaluationTest, RecallIsTheShareOfAllActiveNeurons) {
  const Evaluation e = Evaluate({{Tier::kExact, Tier::kHigh}, false});
  const ReadFigures &exact = e.tiers[0].layers[0], &high = e.tiers[1].layers[0];
  EXPECT_NEAR(high.recall, high.mlp_active / exact.mlp_active, 1e-9);
  EXPECT_LT(high.recall, 1.0);
}

TEST_F(EvaluationTest, HowTheWorkIsCutChangesNothing) {
  const Evaluation single_rows = Evaluate({kEveryTier, false}, /*slots=*/1, /*max_rows=*/1);
  for (const int max_rows : {2, 5, 64}) {
    SCOPED_TRACE(absl::StrCat(max_rows, " rows"));
    ExpectSame(Evaluate({kEveryTier, false}, 1, max_rows), single_rows, 0.0);
  }
  for (const int slots : {3, 8, 11}) {
    SCOPED_TRACE(absl::StrCat(slots, " windows side by side"));
    ExpectSame(Evaluate({kEveryTier, false}, slots, 16), single_rows, 1e-12);
  }
}

TEST_F(EvaluationTest, TiersComeAsTheyAreAskedForAndAlwaysAgainstDense) {
  const Evaluation all = Evaluate({kEveryTier, false});
  const Evaluation some = Evaluate({{Tier::kFast, Tier::kExact}, false});
  ASSERT_EQ(some.tiers.size(), 2u);
  EXPECT_EQ(some.tiers[0].tier, Tier::kFast);
  EXPECT_EQ(some.tiers[1].tier, Tier::kExact);
  EXPECT_EQ(some.tiers[0].perplexity_change, all.tiers[4].perplexity_change);
  EXPECT_EQ(some.tiers[0].kl_nats, all.tiers[4].kl_nats);
  EXPECT_EQ(some.tiers[0].byte_ceiling, all.tiers[4].byte_ceiling);
}

// ---- Unions

TEST_F(EvaluationTest, AUnionHoldsAtLeastWhatEachRowSelects) {
  const Evaluation e = Evaluate({kEveryTier, true}, 3, 3);
  EXPECT_EQ(e.tokens, 6 * (kWindow - 1)) << "whole windows that fill the slots";
  tokens_.resize(6 * kWindow);  // the same ones
  const Evaluation own = Evaluate({kEveryTier, false});
  ASSERT_EQ(own.tokens, e.tokens);
  for (size_t i = 0; i < e.tiers.size(); ++i) {
    SCOPED_TRACE(std::string(Name(e.tiers[i].tier)));
    const bool predicted = IsPredicted(e.tiers[i].tier);
    for (int l = 0; l < kLayers; ++l) {
      const ReadFigures &together = e.tiers[i].layers[l], &alone = own.tiers[i].layers[l];
      EXPECT_EQ(together.mlp_selected > together.mlp_own_selected, predicted);
      EXPECT_GE(together.mlp_selected, alone.mlp_selected);
      EXPECT_GE(together.mlp_active, alone.mlp_active);
      EXPECT_GE(together.head_density, alone.head_density);
      EXPECT_LE(together.mlp_selected, std::min(1.0, 3 * together.mlp_own_selected));
    }
    EXPECT_LT(e.tiers[i].weight_bytes_per_token, own.tiers[i].weight_bytes_per_token);
    if (predicted) {
      EXPECT_LT(e.tiers[i].kl_nats, own.tiers[i].kl_nats) << "more neurons help";
      EXPECT_NE(e.tiers[i].perplexity, own.tiers[i].perplexity);
    } else {
      EXPECT_NEAR(e.tiers[i].perplexity, own.tiers[i].perplexity, 1e-10);
    }
  }
}

// Rows that select the same are their own union, and what they read is shared.
TEST_F(EvaluationTest, AUnionOfEqualWindowsIsOneOfThem) {
  constexpr int kBatch = 4;
  tokens_.resize(kWindow);
  const Evaluation one = Evaluate({kEveryTier, false});
  for (int i = kWindow; i < kBatch * kWindow; ++i) tokens_.push_back(tokens_[i - kWindow]);
  const Evaluation together = Evaluate({kEveryTier, true}, kBatch, kBatch);
  const int per_row = 2 * kHidden * kFloat;  // the embeddings
  for (size_t i = 0; i < one.tiers.size(); ++i) {
    SCOPED_TRACE(std::string(Name(one.tiers[i].tier)));
    EXPECT_NEAR(together.tiers[i].perplexity, one.tiers[i].perplexity, 1e-10);
    ExpectSameReads(together.tiers[i].mean, one.tiers[i].mean);
    EXPECT_NEAR(together.tiers[i].weight_bytes_per_token - per_row,
                (one.tiers[i].weight_bytes_per_token - per_row) / kBatch, 1e-6);
  }
}

// ---- Bytes

TEST_F(EvaluationTest, DenseReadsTheWholeCheckpointButTheEmbeddingsOfOtherTokens) {
  int64_t all = 0;
  for (const auto& [name, values] : checkpoint_.tensors) all += static_cast<int64_t>(values.data.size()) * kFloat;
  const int64_t positions = (32 + kPositionOffset) * kHidden * kFloat;
  const Evaluation e = Evaluate({{Tier::kDense}, false});
  EXPECT_EQ(e.tiers[0].weight_bytes_per_token, all - positions + 2 * kHidden * kFloat);
}

// Three numbers per checkpoint, from its config.json by hand.
TEST(Evaluation, BytesFollowTheStoredTypesAndTheProjections) {
  struct Case {
    const char* name;
    int64_t stored;  // bytes per weight
    int64_t hidden, ffn, layers, vocab, embed;
    bool final_norm;
  };
  for (const Case& c : {Case{"pre-norm-hd64", 2, 192, 768, 2, 1003, 192, true},
                        Case{"pre-norm-hd128-sharded", 2, 256, 1024, 2, 777, 256, true},
                        Case{"odd-ffn-float32", 4, 128, 301, 2, 260, 128, true}}) {
    const int64_t mlp = 2 * c.ffn * c.hidden * c.stored + (c.ffn + c.hidden) * 4;
    const int64_t attention = 4 * c.hidden * c.hidden * c.stored + 4 * c.hidden * 4;
    const int64_t norms = 4 * c.hidden * 4;
    const int64_t rest = c.vocab * c.embed * c.stored + (c.embed + c.hidden) * c.stored + 2 * c.hidden * 4;
    const auto runner = RunnerFor(CheckpointPath(c.name), 1, 5, 8);
    const auto e = Evaluate(*runner, nullptr, {2, 3, 4}, {{Tier::kDense, Tier::kExact}, false}, nullptr);
    ASSERT_TRUE(e.ok()) << e.status();
    EXPECT_EQ(e->tiers[0].weight_bytes_per_token, c.layers * (mlp + attention + norms) + rest) << c.name;
    const ReadFigures& exact = e->tiers[1].mean;
    const double exact_mlp = static_cast<double>(c.ffn * c.hidden * c.stored) * (1.0 + exact.mlp_active) +
                             static_cast<double>((c.ffn + c.hidden) * 4);
    EXPECT_NEAR(exact.mlp_byte_share, exact_mlp / static_cast<double>(mlp), 1e-12) << c.name;
  }
}

TEST_F(EvaluationTest, BytesOfAPredictedTierAreWhatItSelectsAndItsPredictor) {
  predictor_.layers[0].heads = {};
  predictor_.layers[1].neurons.points[static_cast<size_t>(Tier::kFast)].reset();  // EXACT there
  SelectTheFirst(7, &predictor_.layers[0].neurons);
  SelectTheFirst(1, &predictor_.layers[1].heads);
  // HIGH audits layer 1, right before FAST.
  const Evaluation e = Evaluate({{Tier::kDense, Tier::kHigh, Tier::kFast}, false});
  const TierEvaluation& fast = e.tiers[2];
  EXPECT_EQ(fast.layers[0].mlp_selected, 7.0 / kFfn);
  EXPECT_EQ(fast.layers[1].mlp_selected, 1.0);
  EXPECT_EQ(fast.layers[0].head_density, 1.0);
  EXPECT_EQ(fast.layers[1].head_density, 0.5);
  EXPECT_EQ(fast.layers[1].recall, 1.0);
  EXPECT_EQ(fast.mean.recall, fast.layers[0].recall) << "only layers with an operating point count";

  const int rank = kRandomNeuronRank - 2;  // FAST's
  const int neurons = rank * kHidden + rank * 4 + rank * kFfn + kFfn * 2;
  const double down0 = fast.layers[0].mlp_active * kFfn * kDownRow, down1 = fast.layers[1].mlp_active * kFfn * kDownRow;
  const double mlp0 = 7 * kUpRow + down0 + kDownBias + neurons, mlp1 = kFfn * kUpRow + down1 + kDownBias;
  EXPECT_NEAR(fast.layers[0].mlp_byte_share, mlp0 / kDenseMlp, 1e-12);
  EXPECT_NEAR(fast.layers[1].mlp_byte_share, mlp1 / kDenseMlp, 1e-12);
  EXPECT_NEAR(fast.mean.mlp_byte_share, (mlp0 + mlp1) / 2 / kDenseMlp, 1e-12);

  // The heads' stage A rides along whole; of stage B, FAST reads the first rows.
  const int heads = kRandomHeadRank * (kHidden + 4) + (kRandomHeadRank - 1) * kHeads + kHeads * 2;
  const int head_dim = kHidden / kHeads;
  const int skipped_head = head_dim * (kHidden + 1) * kFloat + head_dim * kHidden * kFloat;
  const double dense = e.tiers[0].weight_bytes_per_token;
  const double expected = dense - 2 * kDenseMlp + mlp0 + mlp1 - skipped_head + heads;
  EXPECT_NEAR(fast.weight_bytes_per_token, expected, 1e-6);
  EXPECT_NEAR(fast.byte_ceiling, dense / expected, 1e-12);
}

// ---- The report

TEST_F(EvaluationTest, JsonHasEveryKeyForEveryTier) {
  const Evaluation e = Evaluate({kEveryTier, false});
  const auto json = nlohmann::json::parse(EvaluationJson(e));
  EXPECT_EQ(json.size(), 3u);
  EXPECT_EQ(json["weight_dtype"], "float32");
  EXPECT_EQ(json["tokens"], e.tokens);
  ASSERT_EQ(json["tiers"].size(), 5u);
  for (size_t i = 0; i < 5; ++i) {
    const auto& tier = json["tiers"][i];
    EXPECT_EQ(tier["tier"], std::string(Name(kAllTiers[i])));
    for (const char* key : {"perplexity", "perplexity_change", "top1_agreement", "kl_nats", "mlp_density",
                            "head_density", "recall", "precision", "missed_mass", "mlp_byte_share",
                            "weight_bytes_per_token", "byte_ceiling", "mlp_selected", "mlp_active"}) {
      EXPECT_TRUE(tier.contains(key) && tier[key].is_number()) << key;
    }
    ASSERT_EQ(tier["layers"].size(), 2u);
    for (int l = 0; l < kLayers; ++l) {
      EXPECT_EQ(tier["layers"][l]["layer"], l);
      EXPECT_EQ(tier["layers"][l]["mlp_density"], e.tiers[i].layers[l].mlp_density());
      EXPECT_EQ(tier["layers"][l]["head_density"], e.tiers[i].layers[l].head_density);
      EXPECT_TRUE(tier["layers"][l].contains("missed_mass"));
    }
    EXPECT_EQ(tier["mlp_density"], (e.tiers[i].mean.mlp_selected + e.tiers[i].mean.mlp_active) / 2);
    EXPECT_EQ(tier["byte_ceiling"], e.tiers[i].byte_ceiling);
  }
}

TEST_F(EvaluationTest, NothingSelectedHasNoPrecision) {
  SetThresholds(kInfinity, &predictor_);
  const Evaluation e = Evaluate({{Tier::kHigh}, false});
  const auto tier = nlohmann::json::parse(EvaluationJson(e))["tiers"][0];
  EXPECT_TRUE(tier["precision"].is_null());
  EXPECT_EQ(tier["recall"], 0.0);
  EXPECT_NEAR(tier["missed_mass"].get<double>(), 1.0, 1e-6);
  EXPECT_EQ(tier["mlp_density"], 0.0);
}

TEST_F(EvaluationTest, TheTableHasALineForEachTierAndItsColumnsLineUp) {
  const std::string table = EvaluationTable(Evaluate({kEveryTier, false}));
  const size_t width = table.find('\n') + 1;
  ASSERT_EQ(table.size(), 6 * width);
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(table[(i + 2) * width - 1], '\n');
    EXPECT_THAT(table.substr((i + 1) * width), testing::StartsWith(std::string(Name(kAllTiers[i]))));
  }
}

// ---- What is refused

TEST_F(EvaluationTest, ATierThatCannotBeServedIsRefused) {
  predictor_.tiers = {Tier::kHigh};
  const auto other = TryEvaluate({{Tier::kDense, Tier::kFast}, false});
  EXPECT_EQ(other.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(other.status().message()), HasSubstr("no operating point for tier fast"));
  with_predictor_ = false;
  const auto none = TryEvaluate({{Tier::kHigh}, false});
  EXPECT_EQ(none.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(none.status().message()), HasSubstr("tier high needs a predictor"));
}

TEST_F(EvaluationTest, TooFewTokensAreRefused) {
  tokens_.resize(2 * kWindow - 1);
  const auto no_union = TryEvaluate({{Tier::kDense}, true}, 2, 2);
  EXPECT_EQ(no_union.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(no_union.status().message()), AllOf(HasSubstr("23 tokens"), HasSubstr("needs 24")));
  tokens_.resize(2);
  EXPECT_EQ(TryEvaluate({{Tier::kDense}, false})->tokens, 1);
  tokens_.resize(1);
  const auto one = TryEvaluate({{Tier::kDense}, false});
  EXPECT_EQ(one.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(one.status().message()), HasSubstr("1 tokens; at least 2"));
}

TEST_F(EvaluationTest, ATokenBeyondTheVocabularyIsRefused) {
  tokens_.back() = kVocab;
  const auto evaluation = TryEvaluate({{Tier::kDense}, false});
  EXPECT_EQ(evaluation.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(evaluation.status().message()), HasSubstr("token 50; the model knows 50 tokens"));
}

TEST_F(EvaluationTest, LogitsThatAreNotFiniteAreAnError) {
  TinyCheckpoint huge = checkpoint_;
  huge.tensors.at("model.decoder.final_layer_norm.weight").data.assign(kHidden, 3e38f);
  const ScratchDirectory directory;
  huge.Write(directory);
  const auto runner = RunnerFor(directory.path(), 1, 4, kWindow);
  const auto e = dejavu::Evaluate(*runner, nullptr, tokens_, {{Tier::kExact}, false}, nullptr);
  EXPECT_EQ(e.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(e.status().message()), HasSubstr("not finite at token 0"));
}

TEST_F(EvaluationTest, ProgressCountsEveryRowAndCanStopIt) {
  const auto runner = RunnerFor(directory_.path(), 2, 8, kWindow);
  int64_t last = 0, whole = 0;
  const EvaluationOptions options = {{Tier::kHigh}, false};
  const auto e = dejavu::Evaluate(*runner, &predictor_, tokens_, options, [&](int64_t done, int64_t total) {
    EXPECT_GT(done, last);
    last = done;
    whole = total;
    return true;
  });
  ASSERT_TRUE(e.ok());
  EXPECT_EQ(last, whole);
  EXPECT_EQ(whole, 2 * e->tokens) << "DENSE runs too";
  int calls = 0;
  const auto stopped =
      dejavu::Evaluate(*runner, &predictor_, tokens_, options, [&](int64_t, int64_t) { return ++calls < 3; });
  EXPECT_EQ(stopped.status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(calls, 3);
}

}  // namespace
}  // namespace dejavu
