// Synthetic models keep what their names promise: densities, unions, recall, and the same weights for the same seed.
#include "engine/synthetic.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "engine/model_runner.h"
#include "engine/sparsity_control.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

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

}  // namespace
}  // namespace dejavu
