// The forward pass under selections, through ModelRunner: equivalences hold bit by bit, and what a step says that it
// computed is what the plain calculation says.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/ranks/model_runner.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/float16.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/tiny_checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

constexpr Tier kPredictedTiers[] = {Tier::kHigh, Tier::kBalanced, Tier::kFast};

struct Row {
  int32_t slot, position, token;
  Tier tier = Tier::kDense;
  bool deterministic = false;
  bool decodes = true;
};

// One model, driven step by step.
class Runner {
 public:
  explicit Runner(const std::string& model, int slots = 1, int threads = 2) {
    ModelRunner::Options options;
    options.model = model;
    options.threads = threads;
    options.slots = slots;
    options.max_audits = 8;
    options.window = std::min(128, OptConfig::Load(model).value().context);
    runner_ = ModelRunner::Create(options, nullptr).value();
  }
  ModelRunner* operator->() { return runner_.get(); }

  // nullptr: none.
  Runner& With(const PredictorData* data) {
    CHECK(runner_->SetPredictor(data).ok());
    return *this;
  }

  // Rows that decode must come first. Returns logits [rows, vocab].
  std::vector<float> Step(const std::vector<Row>& rows, const std::vector<int32_t>& audits = {}) {
    Batch& batch = runner_->StartBatch();
    for (const Row& row : rows) {
      if (row.decodes) {
        batch.AddDecodeRow(row.slot, row.position, row.token, true, {row.tier, row.deterministic, 0});
      } else {
        batch.AddRow(row.slot, row.position, row.token, true, row.tier);
      }
    }
    batch.audit_rows = audits;
    const absl::Span<const float> logits = runner_->Run();
    return {logits.begin(), logits.end()};
  }

  // Every token decoded in a step of its own; logits [tokens, vocab].
  std::vector<float> Decode(const std::vector<int32_t>& tokens, Tier tier, bool deterministic = false) {
    std::vector<float> all;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const auto logits = Step({{0, static_cast<int32_t>(i), tokens[i], tier, deterministic}});
      all.insert(all.end(), logits.begin(), logits.end());
    }
    return all;
  }

  // Row `row` of the logits of a step or of Decode.
  std::vector<float> At(const std::vector<float>& logits, size_t row) {
    const int32_t vocab = runner_->config().vocab;
    return {logits.begin() + static_cast<ptrdiff_t>(row * vocab),
            logits.begin() + static_cast<ptrdiff_t>((row + 1) * vocab)};
  }

 private:
  std::unique_ptr<ModelRunner> runner_;
};

// How many values differ in their bits.
int64_t Differences(const std::vector<float>& a, const std::vector<float>& b) {
  CHECK(a.size() == b.size());
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i]);
  return count;
}

std::vector<int32_t> RandomTokens(int32_t count, int32_t vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens = {2};
  while (static_cast<int32_t>(tokens.size()) < count)
    tokens.push_back(4 + static_cast<int32_t>(random() % (vocab - 4)));
  return tokens;
}

std::string Underscored(std::string name) {
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

// ---- Every form of OPT, every tap

class SparseForms : public testing::TestWithParam<std::tuple<std::string, Tap>> {
 protected:
  std::string Model() const { return CheckpointPath(std::get<0>(GetParam())); }
  PredictorData Made(uint32_t seed) const {
    return MakePredictor(OptConfig::Load(Model()).value(), std::get<1>(GetParam()), seed);
  }
};

TEST_P(SparseForms, ThresholdsAtMinusInfinityGiveTheLogitsOfDense) {
  PredictorData data = Made(1);
  for (LayerPredictorData& layer : data.layers) {
    SetThresholds(-INFINITY, &layer.neurons);
    if (layer.heads.rank > 0) SetThresholds(-INFINITY, &layer.heads);
  }
  Runner runner(Model());
  const std::vector<int32_t> tokens = RandomTokens(14, runner->config().vocab, 1);
  const std::vector<float> dense = runner.With(nullptr).Decode(tokens, Tier::kDense);
  EXPECT_EQ(Differences(runner.Decode(tokens, Tier::kExact), dense), 0);
  runner.With(&data);
  for (const Tier tier : kPredictedTiers) {
    for (const bool deterministic : {false, true}) {
      EXPECT_EQ(Differences(runner.Decode(tokens, tier, deterministic), dense), 0) << Name(tier);
      EXPECT_EQ(runner->counts().union_selected[0], runner->config().ffn);
      EXPECT_EQ(runner->counts().heads_of(1, 0), runner->config().heads);
    }
  }
  EXPECT_EQ(Differences(runner.Decode(tokens, Tier::kDense), dense), 0);
}

// Seven sequences that decode, of every tier, and one whose prompt comes in pieces: with each other and alone.
TEST_P(SparseForms, ARowThatIsItsOwnMastersGetsTheSameBitsWhateverElseRuns) {
  const PredictorData data = Made(2);
  Runner runner(Model(), /*slots=*/8);
  runner.With(&data);
  constexpr int32_t kSteps = 6;
  const std::vector<std::pair<Tier, bool>> kinds = {
      {Tier::kDense, false}, {Tier::kExact, false}, {Tier::kHigh, true},     {Tier::kBalanced, true},
      {Tier::kFast, true},   {Tier::kFast, false},  {Tier::kBalanced, false}};
  const auto slots = static_cast<int32_t>(kinds.size());
  std::vector<std::vector<int32_t>> tokens;
  for (int32_t s = 0; s <= slots; ++s) tokens.push_back(RandomTokens(3 * kSteps, runner->config().vocab, 20 + s));

  std::vector<std::vector<float>> alone(slots + 1);
  for (int32_t s = 0; s <= slots; ++s) {
    for (int32_t i = 0; i < (s == slots ? 3 * kSteps : kSteps); ++i) {
      const Row row = s == slots ? Row{s, i, tokens[s][i], Tier::kExact, false, /*decodes=*/false}
                                 : Row{s, i, tokens[s][i], kinds[s].first, kinds[s].second};
      const std::vector<float> logits = runner.Step({row});
      alone[s].insert(alone[s].end(), logits.begin(), logits.end());
    }
  }
  std::vector<int64_t> differences(slots + 1, 0);
  for (int32_t i = 0; i < kSteps; ++i) {
    std::vector<Row> rows;
    for (int32_t s = 0; s < slots; ++s) rows.push_back({s, i, tokens[s][i], kinds[s].first, kinds[s].second});
    for (int32_t k = 0; k < 3; ++k)
      rows.push_back({slots, 3 * i + k, tokens[slots][3 * i + k], Tier::kExact, false, false});
    const std::vector<float> logits = runner.Step(rows);
    for (int32_t s = 0; s < slots; ++s) differences[s] += Differences(runner.At(logits, s), runner.At(alone[s], i));
    for (int32_t k = 0; k < 3; ++k) {
      differences[slots] += Differences(runner.At(logits, slots + k), runner.At(alone[slots], 3 * i + k));
    }
  }
  for (int32_t s = 0; s <= slots; ++s) {
    const bool takes_more = s == 5 || s == 6;  // what its batch-mates selected too
    if (takes_more) {
      EXPECT_GT(differences[s], 0) << "this test would not see what it is for";
    } else {
      EXPECT_EQ(differences[s], 0) << "sequence " << s;
    }
  }
}

// What passed through the layers of one step.
class Recorder final : public ModelObserver {
 public:
  explicit Recorder(int32_t layers) : attention(layers), mlp(layers), activations(layers), y(layers) {}
  void OnInput(int32_t layer, Tap at, Tensor x) override {
    if (layer == static_cast<int32_t>(mlp.size())) return;
    (at == Tap::kMlpNorm ? mlp : attention)[layer] = CopyOf(x);
  }
  void OnMlp(int32_t layer, Tensor a, Tensor out) override {
    activations[layer] = CopyOf(a);
    y[layer] = CopyOf(out);
  }

  std::vector<std::vector<float>> attention, mlp;  // [layers][rows * hidden]
  std::vector<std::vector<float>> activations;     // [layers][rows * ffn]
  std::vector<std::vector<float>> y;               // [layers][rows * hidden]

 private:
  static std::vector<float> CopyOf(const Tensor& t) {
    std::vector<float> copy;
    for (int64_t r = 0; r < t.rows; ++r) copy.insert(copy.end(), t.row<float>(r), t.row<float>(r) + t.cols);
    return copy;
  }
};

float WeightAt(const Tensor& w, int64_t row, int64_t col) {
  if (w.dtype == DType::kFloat32) return w.row<float>(row)[col];
  const uint16_t bits = w.row<uint16_t>(row)[col];
  return w.dtype == DType::kFloat16 ? FloatFromFloat16(bits) : FloatFromBFloat16(bits);
}

// max(0, up(x)) of one layer, [ffn].
std::vector<double> PlainActivations(const MlpWeights& mlp, const float* x) {
  std::vector<double> h(mlp.up.outputs());
  for (size_t j = 0; j < h.size(); ++j) {
    h[j] = mlp.up.bias.empty() ? 0.0 : mlp.up.bias.row<float>(0)[j];
    for (int64_t i = 0; i < mlp.up.inputs(); ++i) h[j] += double{x[i]} * WeightAt(mlp.up.weight, j, i);
    h[j] = std::max(h[j], 0.0);
  }
  return h;
}

// Every number of a step from the layers' inputs: selections, their union, activations, what the MLP makes of them, and
// the counts. Where rounding decides whether a neuron is selected, either will do.
void ExpectPlainStep(ModelRunner& runner, const PredictorData& data, const std::vector<Row>& rows,
                     const Recorder& seen) {
  const OptConfig& config = runner.config();
  const StepCounts& counts = runner.counts();
  const auto decode_rows = static_cast<int32_t>(rows.size());
  ASSERT_EQ(counts.decode_rows, decode_rows);
  for (int32_t l = 0; l < config.layers; ++l) {
    SCOPED_TRACE(testing::Message() << "layer " << l);
    const LayerPredictorData& layer = data.layers[l];
    const MlpWeights& mlp = runner.weights().layers[l].mlp;
    const auto tap = [&](int32_t r) {
      const auto& x = layer.tap == Tap::kAttentionNorm ? seen.attention[l]
                      : layer.tap == Tap::kMlpNorm     ? seen.mlp[l]
                                                       : seen.mlp[l - 1];
      return &x[static_cast<size_t>(r) * config.hidden];
    };
    // 0: not selected, 1: selected, 2: too close to tell.
    const auto select = [&](const SelectorData& selector, int32_t r, int32_t outputs, int32_t count) {
      const auto& point = selector.points[static_cast<size_t>(rows[r].tier)];
      std::vector<int> state(outputs, 1);
      if (point.has_value()) {
        const PlainSelection plain = SelectPlainly(selector, *point, tap(r), config.hidden);
        for (int32_t j = 0; j < outputs; ++j) state[j] = plain.close[j] ? 2 : plain.selected[j];
      }
      const auto sure = std::count(state.begin(), state.end(), 1), close = std::count(state.begin(), state.end(), 2);
      EXPECT_GE(count, sure) << "row " << r;
      EXPECT_LE(count, sure + close) << "row " << r;
      return state;
    };
    const auto unite = [](const std::vector<std::vector<int>>& own) {
      std::vector<int> any(own[0].size(), 0);
      for (const auto& state : own) {
        for (size_t j = 0; j < any.size(); ++j) any[j] = any[j] == 1 || state[j] == 1 ? 1 : std::max(any[j], state[j]);
      }
      return any;
    };
    const auto expect_union = [](const std::vector<int>& any, int32_t count) {
      EXPECT_GE(count, std::count(any.begin(), any.end(), 1));
      EXPECT_LE(count, std::count(any.begin(), any.end(), 1) + std::count(any.begin(), any.end(), 2));
    };
    std::vector<std::vector<int>> own, heads;
    for (int32_t r = 0; r < decode_rows; ++r) {
      own.push_back(select(layer.neurons, r, config.ffn, counts.selected_of(l, r)));
      heads.push_back(select(layer.heads, r, config.heads, counts.heads_of(l, r)));
    }
    const std::vector<int> any = unite(own);
    expect_union(any, counts.union_selected[l]);
    expect_union(unite(heads), counts.union_heads[l]);

    std::vector<bool> active_in_any(config.ffn, false);
    for (int32_t r = 0; r < decode_rows; ++r) {
      const std::vector<double> whole = PlainActivations(mlp, &seen.mlp[l][static_cast<size_t>(r) * config.hidden]);
      const float* const found = &seen.activations[l][static_cast<size_t>(r) * config.ffn];
      const std::vector<int>& computed = rows[r].deterministic && IsPredicted(rows[r].tier) ? own[r] : any;
      std::vector<double> y(config.hidden);
      for (int32_t i = 0; i < config.hidden; ++i) y[i] = mlp.down.bias.empty() ? 0.0 : mlp.down.bias.row<float>(0)[i];
      int64_t active = 0;
      bool sure = true;
      for (int32_t j = 0; j < config.ffn; ++j) {
        if (any[j] == 0) continue;  // whatever stood there, as where it is too close to tell
        sure = sure && any[j] == 1 && computed[j] != 2;
        if (computed[j] == 1 && any[j] == 1) {
          EXPECT_NEAR(found[j], whole[j], 1e-4 * (1 + whole[j])) << "row " << r << ", neuron " << j;
        }
        if (computed[j] == 0 && any[j] == 1) {
          EXPECT_EQ(found[j], 0.0f) << "row " << r << ", neuron " << j;
        }
        if (any[j] != 1) continue;
        active += found[j] != 0.0f;
        active_in_any[j] = active_in_any[j] || found[j] != 0.0f;
        for (int32_t i = 0; i < config.hidden; ++i) y[i] += double{found[j]} * WeightAt(mlp.down.weight, j, i);
      }
      if (!sure) continue;
      EXPECT_EQ(counts.active_of(l, r), active) << "row " << r;
      for (int32_t i = 0; i < config.hidden; ++i) {
        EXPECT_NEAR(seen.y[l][static_cast<size_t>(r) * config.hidden + i], y[i], 1e-3 * (1 + std::abs(y[i])));
      }
    }
    if (std::count(any.begin(), any.end(), 2) == 0) {
      EXPECT_EQ(counts.active_of(l, decode_rows), std::count(active_in_any.begin(), active_in_any.end(), true));
    }
  }
}

TEST_P(SparseForms, AStepComputesAndCountsWhatThePlainCalculationSays) {
  const PredictorData data = Made(3);
  Runner runner(Model(), /*slots=*/6);
  runner.With(&data);
  Recorder recorder(runner->config().layers);
  runner->model().set_observer(&recorder);
  const std::vector<std::vector<std::pair<Tier, bool>>> steps = {
      {{Tier::kFast, false}, {Tier::kFast, true}, {Tier::kBalanced, false}},
      {{Tier::kHigh, true}},
      {{Tier::kFast, false}},
      {{Tier::kBalanced, true}, {Tier::kFast, true}, {Tier::kHigh, false}, {Tier::kFast, false}},
      {{Tier::kFast, true}, {Tier::kExact, false}, {Tier::kHigh, false}, {Tier::kDense, true}},
  };
  for (size_t i = 0; i < steps.size(); ++i) {
    SCOPED_TRACE(testing::Message() << "step " << i);
    std::vector<Row> rows;
    for (const auto& [tier, deterministic] : steps[i]) {
      const auto slot = static_cast<int32_t>(rows.size());
      rows.push_back({slot, 0, RandomTokens(2, runner->config().vocab, 50 + slot + 10 * i)[1], tier, deterministic});
    }
    runner.Step(rows);
    ExpectPlainStep(*runner.operator->(), data, rows, recorder);
    const bool has_dense = steps[i].back().first == Tier::kDense;
    EXPECT_EQ(runner->counts().skipped_zeros, !has_dense);
    EXPECT_EQ(runner->counts().union_down_of(1),
              has_dense ? runner->config().ffn : runner->counts().active_of(1, static_cast<int32_t>(rows.size())));
  }
}

INSTANTIATE_TEST_SUITE_P(AllForms, SparseForms,
                         testing::Combine(testing::ValuesIn(GoldenCheckpoints()),
                                          testing::Values(Tap::kAttentionNorm, Tap::kMlpNorm, Tap::kPreviousLayer)),
                         [](const auto& info) {
                           return Underscored(std::get<0>(info.param) + "_" +
                                              std::string(Name(std::get<1>(info.param))));
                         });

// ---- Known selections on small models

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
    Runner runner(directory.path(), /*slots=*/3);
    const std::vector<int32_t> tokens = RandomTokens(24, runner->config().vocab, 4);
    const std::vector<float> dense = runner.Decode(tokens, Tier::kDense);
    const PredictorData oracle = Oracle(tiny, runner->config());
    runner.With(&oracle);
    int64_t selected = 0;
    for (const bool deterministic : {false, true}) {
      for (size_t i = 0; i < tokens.size(); ++i) {
        const auto position = static_cast<int32_t>(i);
        // Beside two other sequences: one a step behind itself, one repeating the first token.
        const std::vector<Row> rows = {{0, position, tokens[i], Tier::kFast, deterministic},
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
  Runner runner(directory.path(), /*slots=*/4);
  const std::vector<int32_t> tokens = RandomTokens(20, runner->config().vocab, 8);
  const std::vector<float> dense = runner.Decode(tokens, Tier::kDense);
  std::vector<std::vector<float>> expected;
  for (const auto& [tier, choice] : choices) {
    const ScratchDirectory other;
    WithHeadsOnly(tiny, choice, kHeads).Write(other);
    expected.push_back(Runner(other.path()).Decode(tokens, Tier::kDense));
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
      std::vector<Row> rows;
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
  Runner runner(directory.path());
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
    Runner runner(directory.path());
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
  Runner runner(directory.path());
  PredictorData data = MakePredictor(runner->config(), Tap::kMlpNorm, 6);
  data.layers[1].neurons = {};
  SelectOnly({}, Tier::kBalanced, &data.layers[0].neurons);
  const std::vector<int32_t> tokens = RandomTokens(10, runner->config().vocab, 11);
  EXPECT_EQ(Differences(runner.With(&data).Decode(tokens, Tier::kBalanced),
                        Runner(other.path()).Decode(tokens, Tier::kDense)),
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
    Runner runner(model, /*slots=*/4, threads);
    runner.With(&data);
    std::vector<float>& all = logits.emplace_back();
    for (int32_t i = 0; i < 8; ++i) {
      std::vector<Row> rows;
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
