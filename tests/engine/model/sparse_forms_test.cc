// The forward pass under selections, for every form of OPT and every tap: equivalences hold bit by bit, and what a step
// says that it computed is what the plain calculation says.
#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/ranks/model_runner.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/float16.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/model/step_runner.h"

namespace dejavu {
namespace {

std::string Underscored(std::string name) {
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

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
  StepRunner runner(Model());
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
  StepRunner runner(Model(), /*slots=*/8);
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
      const StepRow row = s == slots ? StepRow{s, i, tokens[s][i], Tier::kExact, false, /*decodes=*/false}
                                     : StepRow{s, i, tokens[s][i], kinds[s].first, kinds[s].second};
      const std::vector<float> logits = runner.Step({row});
      alone[s].insert(alone[s].end(), logits.begin(), logits.end());
    }
  }
  std::vector<int64_t> differences(slots + 1, 0);
  for (int32_t i = 0; i < kSteps; ++i) {
    std::vector<StepRow> rows;
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
class PlainStep {
 public:
  PlainStep(ModelRunner& runner, const PredictorData& data, const std::vector<StepRow>& rows, const Recorder& seen)
      : config_(runner.config()),
        counts_(runner.counts()),
        weights_(runner.weights()),
        data_(data),
        rows_(rows),
        seen_(seen),
        decode_rows_(static_cast<int32_t>(rows.size())) {}

  void Expect() const {
    ASSERT_EQ(counts_.decode_rows, decode_rows_);
    for (int32_t l = 0; l < config_.layers; ++l) {
      SCOPED_TRACE(testing::Message() << "layer " << l);
      ExpectLayer(l);
    }
  }

 private:
  // By output. 0: not selected, 1: selected, 2: too close to tell.
  using States = std::vector<int>;

  void ExpectLayer(int32_t l) const {
    std::vector<States> own, heads;
    for (int32_t r = 0; r < decode_rows_; ++r) {
      own.push_back(Select(l, data_.layers[l].neurons, r, config_.ffn, counts_.selected_of(l, r)));
      heads.push_back(Select(l, data_.layers[l].heads, r, config_.heads, counts_.heads_of(l, r)));
    }
    const States any = Union(own);
    ExpectUnion(any, counts_.union_selected[l]);
    ExpectUnion(Union(heads), counts_.union_heads[l]);

    std::vector<bool> active_in_any(config_.ffn, false);
    for (int32_t r = 0; r < decode_rows_; ++r) {
      const bool takes_own = rows_[r].deterministic && IsPredicted(rows_[r].tier);
      ExpectMlp(l, r, any, takes_own ? own[r] : any, &active_in_any);
    }
    if (std::count(any.begin(), any.end(), 2) == 0) {
      EXPECT_EQ(counts_.active_of(l, decode_rows_), std::count(active_in_any.begin(), active_in_any.end(), true));
    }
  }

  // What the predictor of layer `l` reads for row `r`.
  const float* TapOf(int32_t l, int32_t r) const {
    const Tap tap = data_.layers[l].tap;
    const auto& x = tap == Tap::kAttentionNorm ? seen_.attention[l]
                    : tap == Tap::kMlpNorm     ? seen_.mlp[l]
                                               : seen_.mlp[l - 1];
    return &x[static_cast<size_t>(r) * config_.hidden];
  }

  States Select(int32_t l, const SelectorData& selector, int32_t r, int32_t outputs, int32_t count) const {
    const auto& point = selector.points[static_cast<size_t>(rows_[r].tier)];
    States state(outputs, 1);
    if (point.has_value()) {
      const PlainSelection plain = SelectPlainly(selector, *point, TapOf(l, r), config_.hidden);
      for (int32_t j = 0; j < outputs; ++j) state[j] = plain.close[j] ? 2 : plain.selected[j];
    }
    const auto sure = std::count(state.begin(), state.end(), 1), close = std::count(state.begin(), state.end(), 2);
    EXPECT_GE(count, sure) << "row " << r;
    EXPECT_LE(count, sure + close) << "row " << r;
    return state;
  }

  static States Union(const std::vector<States>& own) {
    States any(own[0].size(), 0);
    for (const States& state : own) {
      for (size_t j = 0; j < any.size(); ++j) any[j] = any[j] == 1 || state[j] == 1 ? 1 : std::max(any[j], state[j]);
    }
    return any;
  }

  static void ExpectUnion(const States& any, int32_t count) {
    EXPECT_GE(count, std::count(any.begin(), any.end(), 1));
    EXPECT_LE(count, std::count(any.begin(), any.end(), 1) + std::count(any.begin(), any.end(), 2));
  }

  // Of row `r`, which computes `computed` of the neurons that `any` row selects.
  void ExpectMlp(int32_t l, int32_t r, const States& any, const States& computed,
                 std::vector<bool>* active_in_any) const {
    const MlpWeights& mlp = weights_.layers[l].mlp;
    const std::vector<double> whole = PlainActivations(mlp, &seen_.mlp[l][static_cast<size_t>(r) * config_.hidden]);
    const float* const found = &seen_.activations[l][static_cast<size_t>(r) * config_.ffn];
    std::vector<double> y(config_.hidden);
    for (int32_t i = 0; i < config_.hidden; ++i) y[i] = mlp.down.bias.empty() ? 0.0 : mlp.down.bias.row<float>(0)[i];
    int64_t active = 0;
    bool sure = true;
    for (int32_t j = 0; j < config_.ffn; ++j) {
      if (any[j] == 0) continue;  // whatever stood there, as where it is too close to tell
      sure = sure && any[j] == 1 && computed[j] != 2;
      if (any[j] != 1) continue;
      if (computed[j] == 1) {
        EXPECT_NEAR(found[j], whole[j], 1e-4 * (1 + whole[j])) << "row " << r << ", neuron " << j;
      }
      if (computed[j] == 0) {
        EXPECT_EQ(found[j], 0.0f) << "row " << r << ", neuron " << j;
      }
      active += found[j] != 0.0f;
      (*active_in_any)[j] = (*active_in_any)[j] || found[j] != 0.0f;
      for (int32_t i = 0; i < config_.hidden; ++i) y[i] += double{found[j]} * WeightAt(mlp.down.weight, j, i);
    }
    if (!sure) return;
    EXPECT_EQ(counts_.active_of(l, r), active) << "row " << r;
    for (int32_t i = 0; i < config_.hidden; ++i) {
      EXPECT_NEAR(seen_.y[l][static_cast<size_t>(r) * config_.hidden + i], y[i], 1e-3 * (1 + std::abs(y[i])));
    }
  }

  const OptConfig& config_;
  const StepCounts& counts_;
  const OptWeights& weights_;
  const PredictorData& data_;
  const std::vector<StepRow>& rows_;
  const Recorder& seen_;
  const int32_t decode_rows_;
};

TEST_P(SparseForms, AStepComputesAndCountsWhatThePlainCalculationSays) {
  const PredictorData data = Made(3);
  StepRunner runner(Model(), /*slots=*/6);
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
    std::vector<StepRow> rows;
    for (const auto& [tier, deterministic] : steps[i]) {
      const auto slot = static_cast<int32_t>(rows.size());
      rows.push_back({slot, 0, RandomTokens(2, runner->config().vocab, 50 + slot + 10 * i)[1], tier, deterministic});
    }
    runner.Step(rows);
    PlainStep(*runner.operator->(), data, rows, recorder).Expect();
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

}  // namespace
}  // namespace dejavu
