// The forward pass under known selections, on small models: what is selected, and nothing else, is computed.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "engine/ranks/model_runner.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/model/step_runner.h"
#include "tests/engine/tiny_checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

// `heads` heads; fc1 in steps of 2^-9 that fit int8, its bias in float16.
TinyCheckpoint Tiny(uint32_t seed, int heads, bool pre_norm = true) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(seed, /*hidden=*/8 * heads, /*ffn=*/75);
  tiny.config["num_attention_heads"] = heads;
  tiny.config["do_layer_norm_before"] = pre_norm;
  for (auto& [name, values] : tiny.tensors) {
    if (name.find("fc1") == std::string::npos) continue;
    for (float& x : values.data) x = std::clamp(std::round(x * 0x1p9f), -127.0f, 127.0f) * 0x1p-9f;
  }
  return tiny;
}

// Stage A is fc1, stage B the identity and the threshold a little below the negative bias: the neurons that are not
// zero, and those so close to it that rounding decides.
PredictorData Oracle(const TinyCheckpoint& tiny, const OptConfig& config) {
  PredictorData data = MakePredictor(config, Tap::kMlpNorm, 1);
  for (int32_t l = 0; l < config.layers; ++l) {
    const std::string at = "model.decoder.layers." + std::to_string(l) + ".fc1.";
    SelectorData& neurons = data.layers[l].neurons;
    neurons.rank = config.ffn;
    neurons.a.clear();
    for (const float w : tiny.tensors.at(at + "weight").data) neurons.a.push_back(static_cast<int8_t>(w * 0x1p9f));
    neurons.a_scale.assign(config.ffn, 0x1p-9f);
    neurons.b.assign(static_cast<size_t>(config.ffn) * config.ffn, 0);
    for (int32_t j = 0; j < config.ffn; ++j) neurons.b[static_cast<size_t>(j) * (config.ffn + 1)] = 1;
    for (const Tier tier : kPredictedTiers) {
      OperatingPoint& point = *neurons.points[static_cast<size_t>(tier)];
      point.rank = config.ffn;
      for (int32_t j = 0; j < config.ffn; ++j) point.thresholds[j] = -tiny.tensors.at(at + "bias").data[j] - 0.004f;
    }
  }
  return data;
}

TEST(SparseModel, SelectingExactlyWhatIsNotZeroGivesTheLogitsOfDense) {
  for (const bool pre_norm : {true, false}) {
    const ScratchDirectory directory;
    const TinyCheckpoint tiny = Tiny(3, 4, pre_norm);
    tiny.Write(directory);
    StepRunner runner(directory.path(), /*slots=*/3);
    const std::vector<int32_t> tokens = RandomTokens(24, runner->config().vocab, 4);
    const std::vector<float> dense = runner.Decode(tokens, Tier::kDense);
    const PredictorData oracle = Oracle(tiny, runner->config());
    runner.With(&oracle);
    int64_t selected = 0;
    for (const bool deterministic : {false, true}) {
      for (size_t i = 0; i < tokens.size(); ++i) {
        const auto position = static_cast<int32_t>(i);
        // Beside two other sequences: one a step behind itself, one repeating the first token.
        const std::vector<StepRow> rows = {{0, position, tokens[i], Tier::kFast, deterministic},
                                           {1, position, tokens[i > 0 ? i - 1 : 0], Tier::kHigh, true},
                                           {2, position, tokens[0], Tier::kBalanced, false}};
        const std::vector<float> logits = runner.Step(rows, /*audits=*/{0, 1, 2});
        EXPECT_EQ(Differences(runner.At(logits, 0), runner.At(dense, i)), 0) << "token " << i;
        for (int32_t l = 0; l < runner->config().layers; ++l) {
          for (int32_t r = 0; r < 3; ++r) {
            const float* audit = runner->counts().audit_of(l, r);
            EXPECT_GE(audit[kAuditSelected], audit[kAuditActive]);
            EXPECT_LE(audit[kAuditSelected], audit[kAuditActive] + 5);
            EXPECT_EQ(audit[kAuditHits], audit[kAuditActive]);
            EXPECT_EQ(audit[kAuditMissedMass], 0.0f);
            EXPECT_EQ(runner->counts().selected_of(l, r), static_cast<int32_t>(audit[kAuditSelected]));
          }
          selected += runner->counts().selected_of(l, 0);
        }
      }
    }
    const double density = static_cast<double>(selected) / (2.0 * 2 * 24 * runner->config().ffn);
    EXPECT_GT(density, 0.1);
    EXPECT_LT(density, 0.9);
  }
}

using Choice = std::vector<std::vector<int32_t>>;  // [layers] heads

// The predictor that chooses these heads in these tiers, whatever comes, and all neurons.
PredictorData ChoosingHeads(const OptConfig& config, const std::vector<std::pair<Tier, Choice>>& choices, Tap tap) {
  PredictorData data = MakePredictor(config, tap, 6);
  for (int32_t l = 0; l < config.layers; ++l) {
    if (l == 1) data.layers[l].neurons = {};
    SetThresholds(-INFINITY, &data.layers[l].neurons);
    for (const auto& [tier, choice] : choices) SelectOnly(choice[l], tier, &data.layers[l].heads);
  }
  return data;
}

// The model without what the other heads add.
TinyCheckpoint WithHeadsOnly(TinyCheckpoint tiny, const Choice& choice, int heads) {
  for (size_t l = 0; l < choice.size(); ++l) {
    auto& out = tiny.tensors.at("model.decoder.layers." + std::to_string(l) + ".self_attn.out_proj.weight");
    const int64_t hidden = out.shape[0], head_dim = hidden / heads;
    for (int head = 0; head < heads; ++head) {
      if (std::find(choice[l].begin(), choice[l].end(), head) != choice[l].end()) continue;
      for (int64_t i = 0; i < hidden; ++i) std::fill_n(&out.data[i * hidden + head * head_dim], head_dim, 0.0f);
    }
  }
  return tiny;
}

TEST(SparseModel, ChosenHeadsGiveWhatAModelWithoutTheOthersGives) {
  constexpr int kHeads = 5;
  const TinyCheckpoint tiny = Tiny(7, kHeads);
  const std::vector<std::pair<Tier, Choice>> choices = {
      {Tier::kHigh, {{0, 2, 4}, {1}}}, {Tier::kBalanced, {{}, {0, 1, 2, 3, 4}}}, {Tier::kFast, {{3}, {}}}};
  const ScratchDirectory directory;
  tiny.Write(directory);
  StepRunner runner(directory.path(), /*slots=*/4);
  const std::vector<int32_t> tokens = RandomTokens(20, runner->config().vocab, 8);
  const std::vector<float> dense = runner.Decode(tokens, Tier::kDense);
  std::vector<std::vector<float>> expected;
  for (const auto& [tier, choice] : choices) {
    const ScratchDirectory other;
    WithHeadsOnly(tiny, choice, kHeads).Write(other);
    expected.push_back(StepRunner(other.path()).Decode(tokens, Tier::kDense));
    EXPECT_GT(Differences(expected.back(), dense), 0);
  }
  for (const Tap tap : {Tap::kAttentionNorm, Tap::kPreviousLayer}) {
    const PredictorData data = ChoosingHeads(runner->config(), choices, tap);
    runner.With(&data);
    for (size_t c = 0; c < choices.size(); ++c) {
      EXPECT_EQ(Differences(runner.Decode(tokens, choices[c].first), expected[c]), 0) << Name(choices[c].first);
      for (int32_t l = 0; l < 2; ++l) {
        EXPECT_EQ(runner->counts().heads_of(l, 0), static_cast<int32_t>(choices[c].second[l].size()));
        EXPECT_EQ(runner->counts().union_heads[l], static_cast<int32_t>(choices[c].second[l].size()));
      }
    }
    // All in one step, each row with its own heads, and a dense one.
    for (size_t i = 0; i < tokens.size(); ++i) {
      std::vector<StepRow> rows;
      for (size_t c = 0; c < choices.size(); ++c) {
        rows.push_back({static_cast<int32_t>(c), static_cast<int32_t>(i), tokens[i], choices[c].first});
      }
      if (i % 2 == 1) rows.push_back({3, static_cast<int32_t>(i), tokens[i], Tier::kDense});
      if (i % 2 == 0) rows.push_back({3, static_cast<int32_t>(i), tokens[i], Tier::kExact, false, /*decodes=*/false});
      const std::vector<float> logits = runner.Step(rows);
      for (size_t c = 0; c < choices.size(); ++c) {
        EXPECT_EQ(Differences(runner.At(logits, c), runner.At(expected[c], i)), 0) << "row " << c << ", token " << i;
      }
      EXPECT_EQ(Differences(runner.At(logits, 3), runner.At(dense, i)), 0) << "token " << i;
      EXPECT_EQ(runner->counts().heads_of(0, 1), 0);
    }
  }
}

TEST(SparseModel, ChoosingEveryHeadGivesTheLogitsOfDense) {
  const TinyCheckpoint tiny = Tiny(9, 3, /*pre_norm=*/false);
  const ScratchDirectory directory;
  tiny.Write(directory);
  StepRunner runner(directory.path());
  const std::vector<int32_t> tokens = RandomTokens(20, runner->config().vocab, 9);
  const std::vector<float> dense = runner.Decode(tokens, Tier::kDense);
  const PredictorData data =
      ChoosingHeads(runner->config(), {{Tier::kFast, {{0, 1, 2}, {2, 1, 0}}}}, Tap::kAttentionNorm);
  EXPECT_EQ(Differences(runner.With(&data).Decode(tokens, Tier::kFast), dense), 0);
}

// In the last layer, whose keys and values do not depend on what was left out.
TEST(SparseModel, KeysAndValuesOfSkippedHeadsAreThereWhenTheyAreWantedLater) {
  for (const bool pre_norm : {true, false}) {
    const TinyCheckpoint tiny = Tiny(10, 4, pre_norm);
    const ScratchDirectory directory;
    tiny.Write(directory);
    StepRunner runner(directory.path());
    const std::vector<int32_t> tokens = RandomTokens(20, runner->config().vocab, 10);
    const std::vector<float> dense = runner.Decode(tokens, Tier::kDense);
    PredictorData data = ChoosingHeads(
        runner->config(), {{Tier::kFast, {{0, 1, 2, 3}, {}}}, {Tier::kHigh, {{0, 1, 2, 3}, {2}}}}, Tap::kAttentionNorm);
    data.layers[1].neurons = MakePredictor(runner->config(), Tap::kAttentionNorm, 6).layers[1].neurons;
    SelectOnly({}, Tier::kFast, &data.layers[1].neurons);
    // A cache that holds nothing of the dense run.
    runner.With(nullptr).Decode(std::vector<int32_t>(tokens.size(), 7), Tier::kDense);
    runner.With(&data);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const auto position = static_cast<int32_t>(i);
      const bool wants_all = i % 5 == 4;
      const Tier skipping = i % 3 == 0 ? Tier::kHigh : Tier::kFast;
      const std::vector<float> logits = runner.Step({{0, position, tokens[i], wants_all ? Tier::kDense : skipping}});
      EXPECT_EQ(Differences(logits, runner.At(dense, i)) == 0, wants_all) << "token " << i;
    }
  }
}

TEST(SparseModel, NoNeuronAtAllLeavesTheBiasOfTheMlp) {
  const TinyCheckpoint tiny = Tiny(11, 3);
  TinyCheckpoint without = tiny;
  for (int l = 0; l < 2; ++l) {
    auto& down = without.tensors.at("model.decoder.layers." + std::to_string(l) + ".fc2.weight").data;
    if (l == 0) std::fill(down.begin(), down.end(), 0.0f);
  }
  const ScratchDirectory directory, other;
  tiny.Write(directory);
  without.Write(other);
  StepRunner runner(directory.path());
  PredictorData data = MakePredictor(runner->config(), Tap::kMlpNorm, 6);
  data.layers[1].neurons = {};
  SelectOnly({}, Tier::kBalanced, &data.layers[0].neurons);
  const std::vector<int32_t> tokens = RandomTokens(10, runner->config().vocab, 11);
  EXPECT_EQ(Differences(runner.With(&data).Decode(tokens, Tier::kBalanced),
                        StepRunner(other.path()).Decode(tokens, Tier::kDense)),
            0);
  EXPECT_EQ(runner->counts().union_selected[0], 0);
  EXPECT_EQ(runner->counts().active_of(0, 0), 0);
  EXPECT_EQ(runner->counts().active_of(0, 1), 0);
}

TEST(SparseModel, NothingDependsOnTheNumberOfThreads) {
  const std::string model = EMBEDDED_MODEL;
  const PredictorData data = ReadPredictorOf(model);
  std::vector<std::vector<float>> logits;
  for (const int threads : {1, 2, 3}) {
    StepRunner runner(model, /*slots=*/4, threads);
    runner.With(&data);
    std::vector<float>& all = logits.emplace_back();
    for (int32_t i = 0; i < 8; ++i) {
      std::vector<StepRow> rows;
      for (int32_t s = 0; s < 4; ++s) rows.push_back({s, i, 100 + 50 * s + 7 * i, kAllTiers[1 + s], s % 2 == 0});
      const std::vector<float> step = runner.Step(rows);
      all.insert(all.end(), step.begin(), step.end());
    }
  }
  EXPECT_EQ(Differences(logits[1], logits[0]), 0);
  EXPECT_EQ(Differences(logits[2], logits[0]), 0);
}

}  // namespace
}  // namespace dejavu
