// Synthetic models keep what their names promise: densities, unions, recall, and the same weights for the same seed.
#include "engine/load/synthetic/densities.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>

#include "engine/load/checkpoint_writer.h"
#include "engine/model/weight_bytes.h"
#include "engine/ranks/model_runner.h"
#include "engine/serving/compare_logits.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/golden.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int kContext = 24;
constexpr int kLargestBatch = 16;

std::unique_ptr<ModelRunner> MakeRunner(const std::string& model, const std::string& weights = "stored") {
  ModelRunner::Options options;
  options.model = model;
  options.weights = weights;
  options.predictor = "";
  options.threads = 1;  // tiny steps: a barrier on a busy machine costs more than they do
  options.slots = kLargestBatch;
  options.max_rows = 64;
  options.max_audits = kLargestBatch;
  options.window = 128;
  auto runner = ModelRunner::Create(options, nullptr);
  EXPECT_TRUE(runner.ok()) << runner.status();
  return runner.ok() ? *std::move(runner) : nullptr;
}

// Sequences of random tokens side by side.
class Decoder {
 public:
  explicit Decoder(ModelRunner& runner) : runner_(runner), token_(0, runner.config().vocab - 1) {
    for (int slot = 0; slot < kLargestBatch; ++slot) {
      Batch& batch = runner_.StartBatch();
      for (int p = 0; p < kContext; ++p) batch.AddRow(slot, p, token_(random_), /*wants_logits=*/false);
      runner_.Run();
    }
  }

  // One step of `rows` sequences, audited in predicted tiers.
  const StepCounts& Step(Tier tier, int rows) {
    Batch& batch = runner_.StartBatch();
    SparsityParams sparsity;
    sparsity.tier = tier;
    for (int slot = 0; slot < rows; ++slot) {
      if (IsPredicted(tier)) batch.audit_rows.push_back(slot);
      batch.AddDecodeRow(slot, kContext, token_(random_), /*wants_logits=*/false, sparsity);
    }
    runner_.Run();
    return runner_.counts();
  }

 private:
  ModelRunner& runner_;
  std::mt19937 random_{7};
  std::uniform_int_distribution<int> token_;
};

// Shares of a layer's neurons, means over steps.
struct Counted {
  double selected = 0.0, active = 0.0;
  double audited_active = 0.0, audited_selected = 0.0, hits = 0.0, mass = 0.0, missed_mass = 0.0;
  double recall() const { return hits / audited_active; }
  double precision() const { return hits / audited_selected; }
};

std::vector<Counted> Count(Decoder& decoder, const OptConfig& config, Tier tier, int rows, int steps) {
  std::vector<Counted> layers(config.layers);
  for (int step = 0; step < steps; ++step) {
    const StepCounts& counts = decoder.Step(tier, rows);
    for (int32_t l = 0; l < config.layers; ++l) {
      Counted& layer = layers[l];
      layer.selected += static_cast<double>(counts.union_selected[l]) / config.ffn / steps;
      layer.active += static_cast<double>(counts.active_of(l, rows)) / config.ffn / steps;
      for (int a = 0; a < rows && IsPredicted(tier); ++a) {
        const float* const found = counts.audit_of(l, a);
        layer.audited_selected += found[kAuditSelected];
        layer.audited_active += found[kAuditActive];
        layer.hits += found[kAuditHits];
        layer.mass += found[kAuditMass];
        layer.missed_mass += found[kAuditMissedMass];
      }
    }
  }
  return layers;
}

TEST(Synthetic, DensitiesAndTheirUnionsFollowThePublishedProfile) {
  constexpr int kBatches[] = {1, 4, 8, 16};
  // OPT-6.7b in Polar Sparsity, percent by quarter of the depth.
  constexpr double kPublished[4][4] = {{3.4, 4.4, 13, 17}, {4.6, 11, 30, 37}, {5.9, 18, 41, 52}, {7.7, 26, 55, 70}};
  const SyntheticModel model = *ParseSynthetic("synthetic:opt-tiny");
  const auto runner = MakeRunner("synthetic:opt-tiny");
  ASSERT_NE(runner, nullptr);
  Decoder decoder(*runner);
  for (int b = 0; b < 4; ++b) {
    const int batch = kBatches[b], steps = batch == 1 ? 300 : 60;
    const auto selected = Count(decoder, runner->config(), Tier::kBalanced, batch, steps);
    const auto active = Count(decoder, runner->config(), Tier::kExact, batch, steps);
    for (int l = 0; l < 4; ++l) {
      const SyntheticDensity expected = ExpectedDensity(model, l, batch);
      EXPECT_NEAR(100 * expected.selected, kPublished[b][l], 2.0) << "batch " << batch << ", layer " << l;
      EXPECT_NEAR(selected[l].selected, expected.selected, 0.02) << "batch " << batch << ", layer " << l;
      EXPECT_NEAR(active[l].active, expected.active, 0.02) << "batch " << batch << ", layer " << l;
      std::printf("batch %2d layer %d: published %4.1f, fitted %4.1f, selected %4.1f; active %4.1f of %4.1f\n", batch,
                  l, kPublished[b][l], 100 * expected.selected, 100 * selected[l].selected, 100 * active[l].active,
                  100 * expected.active);
    }
  }
}

TEST(Synthetic, PredictorsReachTheStatedRecallAndPrecision) {
  for (const double recall : {0.95, 0.9}) {
    const std::string name = "synthetic:opt-tiny?recall=" + std::to_string(recall);
    const SyntheticModel model = *ParseSynthetic(name);
    const auto runner = MakeRunner(name);
    ASSERT_NE(runner, nullptr);
    Decoder decoder(*runner);
    for (const Tier tier : {Tier::kHigh, Tier::kBalanced, Tier::kFast}) {
      const double stated = 1.0 - (1.0 - recall) * (tier == Tier::kHigh ? 0.4 : tier == Tier::kFast ? 2.0 : 1.0);
      const auto counted = Count(decoder, runner->config(), tier, kLargestBatch, 40);
      for (int l = 0; l < 4; ++l) {
        const OperatingPoint& point = *runner->predictor_data()->layers[l].neurons.points[static_cast<size_t>(tier)];
        EXPECT_NEAR(counted[l].recall(), stated, 0.02) << Name(tier) << ", layer " << l;
        EXPECT_NEAR(counted[l].missed_mass / counted[l].mass, point.missed_mass, 0.02) << Name(tier) << ", layer " << l;
        if (tier != Tier::kBalanced) continue;
        EXPECT_NEAR(counted[l].precision(), ExpectedDensity(model, l, 1).precision, 0.03) << "layer " << l;
        std::printf("recall %.2f layer %d: counted %.3f, precision %.3f, missed mass %.4f (stated %.4f)\n", recall, l,
                    counted[l].recall(), counted[l].precision(), counted[l].missed_mass / counted[l].mass,
                    point.missed_mass);
      }
    }
  }
}

// Logits of a prompt, every position.
std::vector<float> Logits(ModelRunner& runner, const std::vector<int32_t>& prompt) {
  Batch& batch = runner.StartBatch();
  for (size_t p = 0; p < prompt.size(); ++p) {
    batch.AddRow(0, static_cast<int32_t>(p), prompt[p], /*wants_logits=*/true);
  }
  const auto logits = runner.Run();
  return {logits.begin(), logits.end()};
}

std::vector<int32_t> Greedy(ModelRunner& runner, const std::vector<int32_t>& prompt, Tier tier, int tokens) {
  const auto best = [&](absl::Span<const float> logits) {
    const auto row = logits.last(runner.config().vocab);
    return static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
  };
  const std::vector<float> first = Logits(runner, prompt);
  std::vector<int32_t> out = {best(first)};
  SparsityParams sparsity;
  sparsity.tier = tier;
  while (static_cast<int>(out.size()) < tokens) {
    const auto position = static_cast<int32_t>(prompt.size() + out.size() - 1);
    runner.StartBatch().AddDecodeRow(0, position, out.back(), /*wants_logits=*/true, sparsity);
    out.push_back(best(runner.Run()));
  }
  return out;
}

std::vector<int32_t> SomeTokens(int count, int32_t vocab) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back((i * 7919 + 13) % vocab);
  return tokens;
}

double MeanKl(const std::vector<float>& p, const std::vector<float>& q, int32_t vocab) {
  double sum = 0.0;
  for (size_t at = 0; at < p.size(); at += vocab) sum += CompareLogits(&p[at], &q[at], vocab).kl_nats;
  return sum * vocab / static_cast<double>(p.size());
}

TEST(Synthetic, ExactGivesTheTokensOfDenseAndTheyVary) {
  const auto runner = MakeRunner("synthetic:opt-tiny");
  ASSERT_NE(runner, nullptr);
  const std::vector<int32_t> prompt = SomeTokens(8, runner->config().vocab);
  const std::vector<int32_t> dense = Greedy(*runner, prompt, Tier::kDense, 60);
  EXPECT_EQ(Greedy(*runner, prompt, Tier::kExact, 60), dense);
  EXPECT_GT(std::set<int32_t>(dense.begin(), dense.end()).size(), 30u);
  for (const float logit : Logits(*runner, prompt)) ASSERT_TRUE(std::isfinite(logit));
}

TEST(Synthetic, ASeedNamesTheWeights) {
  const auto bytes = [](const std::string& model, const std::string& weights) {
    const auto runner = MakeRunner(model, weights);
    const OptWeights& w = runner->weights();
    std::string all;
    for (const Tensor& t :
         {w.token_embedding.weight, w.position_embedding, w.layers[1].qkv.weight, w.layers[2].mlp.up.weight,
          w.layers[2].mlp.up.bias, w.layers[3].mlp.down.weight, w.layers[3].mlp.down.bias, w.final_norm.weight}) {
      all.append(static_cast<const char*>(t.data), t.bytes());
    }
    return all;
  };
  for (const char* weights : {"bf16", "int8"}) {
    EXPECT_EQ(bytes("synthetic:opt-tiny?seed=3", weights), bytes("synthetic:opt-tiny?seed=3", weights));
    EXPECT_NE(bytes("synthetic:opt-tiny?seed=3", weights), bytes("synthetic:opt-tiny?seed=4", weights));
  }
  EXPECT_EQ(bytes("synthetic:opt-tiny", "stored"), bytes("synthetic:opt-tiny?seed=1", "bf16"));
}

TEST(Synthetic, EveryTypeHoldsTheSameModel) {
  const auto reference = MakeRunner("synthetic:opt-tiny", "fp32");
  ASSERT_NE(reference, nullptr);
  const int32_t vocab = reference->config().vocab;
  const std::vector<int32_t> prompt = SomeTokens(32, vocab);
  const std::vector<float> wanted = Logits(*reference, prompt);
  const std::pair<const char*, double> limits[] = {{"fp16", 1e-5}, {"bf16", 1e-4}, {"int8", 5e-3}};
  for (const auto& [weights, limit] : limits) {
    const auto runner = MakeRunner("synthetic:opt-tiny", weights);
    ASSERT_NE(runner, nullptr);
    const double kl = MeanKl(wanted, Logits(*runner, prompt), vocab);
    EXPECT_LT(kl, limit) << weights;
    std::printf("%s: mean KL from fp32 %.2g nats\n", weights, kl);
  }
}

TEST(Synthetic, TokensAreToldApart) {
  const auto runner = MakeRunner("synthetic:opt-tiny", "fp32");
  ASSERT_NE(runner, nullptr);
  const Tensor& embedding = runner->weights().token_embedding.weight;
  for (int64_t a = 0; a < embedding.rows; a += 5) {
    for (int64_t b = 0; b < a; ++b) {
      double dot = 0.0;
      for (int64_t c = 0; c < embedding.cols; ++c) dot += embedding.row<float>(a)[c] * embedding.row<float>(b)[c];
      ASSERT_LT(std::fabs(dot / static_cast<double>(embedding.cols)), 0.5) << a << ' ' << b;
    }
  }
}

TEST(Synthetic, RefusesUnknownNamesAndOptions) {
  const auto message = [](const std::string& name) {
    const auto model = ParseSynthetic(name);
    EXPECT_EQ(model.status().code(), absl::StatusCode::kInvalidArgument) << name;
    return std::string(model.status().message());
  };
  EXPECT_THAT(message("synthetic:opt-7b"),
              AllOf(HasSubstr("'opt-7b'"), HasSubstr("synthetic:opt-6.7b"), HasSubstr("synthetic:opt-175b")));
  for (const char* option : {"sed=1", "seed=x", "seed=-1", "recall=1", "recall=nan", "density=0", "seed"}) {
    EXPECT_THAT(message(std::string("synthetic:opt-tiny?seed=2&") + option),
                AllOf(HasSubstr(option), HasSubstr("seed=NUMBER"), HasSubstr("density=")));
  }
  EXPECT_EQ(ParseSynthetic("synthetic:opt-tiny?seed=12&density=0.5")->seed, 12u);
  EXPECT_TRUE(LoadModelConfig("synthetic:opt-13b").ok());
  ModelRunner::Options options;
  options.model = "synthetic:opt-tiny";
  options.weights = "int4";
  EXPECT_EQ(ModelRunner::Create(options, nullptr).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Synthetic, RefusesWhatDoesNotFit) {
  ModelRunner::Options options;
  options.model = "synthetic:opt-175b";
  options.weights = "fp32";
  const absl::Status status = ModelRunner::Create(options, nullptr).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("bytes; this machine has"));
}

TEST(Synthetic, LoadingCanBeCancelled) {
  ModelRunner::Options options;
  options.model = "synthetic:opt-tiny";
  int64_t last = 0;
  const auto runner = ModelRunner::Create(options, [&](int64_t done, int64_t total) {
    EXPECT_LE(done, total);
    last = done;
    return done < total / 2;
  });
  EXPECT_EQ(runner.status().code(), absl::StatusCode::kCancelled);
  EXPECT_GT(last, 0);
}

TEST(Synthetic, FactorsOfInt8AreCounted) {
  const auto runner = MakeRunner("synthetic:opt-tiny", "int8");
  ASSERT_NE(runner, nullptr);
  const OptConfig& config = runner->config();
  const LayerBytes layer(runner->weights().layers[0], config);
  EXPECT_EQ(layer.up_row, config.hidden + 2 * 4);  // values, factor, bias
  EXPECT_EQ(layer.down_row, config.hidden + 4);
  EXPECT_EQ(layer.head, config.head_dim * (2 * config.hidden + 3 * 4));
  EXPECT_EQ(EmbeddingBytes(runner->weights()), config.hidden + 4 + 2 * config.hidden);
}

TEST(CheckpointWriter, WhatItWritesComputesTheSame) {
  const ScratchDirectory directory;
  for (const char* weights : {"bf16", "fp32"}) {
    const std::string path = directory.Path(weights);
    const absl::Status written = WriteCheckpoint("synthetic:opt-tiny?seed=5", weights, path, nullptr);
    ASSERT_TRUE(written.ok()) << written;
    const auto made = MakeRunner("synthetic:opt-tiny?seed=5", weights), read = MakeRunner(path);
    ASSERT_TRUE(made != nullptr && read != nullptr);
    EXPECT_EQ(read->weights().dtype(), made->weights().dtype());
    EXPECT_EQ(read->synthetic(), "");
    const std::vector<int32_t> prompt = SomeTokens(20, made->config().vocab);
    EXPECT_EQ(Logits(*read, prompt), Logits(*made, prompt)) << weights;
    EXPECT_EQ(Greedy(*read, prompt, Tier::kFast, 20), Greedy(*made, prompt, Tier::kFast, 20)) << weights;
  }
  EXPECT_EQ(WriteCheckpoint("synthetic:opt-tiny", "int8", directory.Path("x"), nullptr).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(WriteCheckpoint(directory.path(), "bf16", directory.Path("x"), nullptr).code(),
            absl::StatusCode::kInvalidArgument);
}

// Real checkpoints, all shapes of OPT.
TEST(Int8, StaysCloseToTheStoredWeights) {
  for (const std::string& name : GoldenCheckpoints()) {
    ModelRunner::Options options;
    options.model = CheckpointPath(name);
    options.threads = 1;
    options.window = 16;
    options.weights = "fp32";
    const auto stored = ModelRunner::Create(options, nullptr);
    options.weights = "int8";
    const auto int8 = ModelRunner::Create(options, nullptr);
    ASSERT_TRUE(stored.ok() && int8.ok()) << name << ' ' << stored.status() << int8.status();
    const int32_t vocab = (*stored)->config().vocab;
    const std::vector<int32_t> prompt = SomeTokens(12, vocab);
    const std::vector<float> wanted = Logits(**stored, prompt), got = Logits(**int8, prompt);
    double square = 0.0, error = 0.0, mean = 0.0;
    for (const float logit : wanted) mean += logit / static_cast<double>(wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) {
      square += (wanted[i] - mean) * (wanted[i] - mean);
      error += (got[i] - wanted[i]) * (got[i] - wanted[i]);
    }
    EXPECT_LT(std::sqrt(error / square), 0.05) << name;
    std::printf("%s: error of the logits %.4f of their deviation\n", name.c_str(), std::sqrt(error / square));
  }
}

}  // namespace
}  // namespace dejavu
