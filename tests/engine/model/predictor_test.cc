// The predictor by itself, on inputs for which every sum is exact: what it selects must equal the plain calculation bit
// by bit.
#include "engine/model/predictor.h"

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/made_predictor.h"

namespace dejavu {
namespace {

constexpr int32_t kLayers = 3, kHidden = 20, kHeads = 5, kFfn = 70;
constexpr int32_t kMaxRows = 12, kMaxAudits = 4;

OptConfig SmallConfig() { return ConfigOf(kLayers, kHidden, kHeads, kFfn); }

// A selection copied from the device.
struct Selected {
  bool all = true;
  std::vector<int32_t> list;
  std::vector<std::vector<bool>> masks;  // [rows][outputs]
  std::vector<int32_t> strict;           // [rows]; empty: all are
};
Selected CopyOf(const Selection& selection, int32_t rows, int32_t outputs) {
  Selected copy;
  copy.all = selection.all();
  if (copy.all) return copy;
  const int32_t* list = selection.indices.row<int32_t>(0);
  copy.list.assign(list, list + *selection.count.row<int32_t>(0));
  for (int32_t r = 0; r < rows; ++r) {
    std::vector<bool>& mask = copy.masks.emplace_back();
    for (int32_t i = 0; i < outputs; ++i) {
      mask.push_back((static_cast<uint32_t>(selection.masks.row<int32_t>(r)[i / 32]) >> (i % 32) & 1) != 0);
    }
  }
  if (selection.strict.empty()) return copy;
  copy.strict.assign(selection.strict.row<int32_t>(0), selection.strict.row<int32_t>(0) + rows);
  return copy;
}

// What one step selected.
struct StepResult {
  std::vector<Selected> heads, neurons;  // [layers]
  std::map<std::pair<int32_t, Tap>, int64_t> ride_rows;
  StepCounts counts;
};

class PredictorTest : public testing::Test {
 protected:
  PredictorTest() : backend_(CreateCpuBackend({2, /*pin=*/false}).value()), batch_(kMaxRows, kMaxRows, kMaxRows, 1) {
    std::mt19937 random(11);
    x_ = Integers(2 * kLayers * kMaxRows, kHidden, 4, &random);
    up_ = Integers(kLayers * kFfn, kHidden, 3, &random);
  }

  void Create(const PredictorData* data) {
    predictor_ = Predictor::Create(data, config_, Shard::Whole(config_), *backend_, kMaxRows, kMaxAudits).value();
  }
  void AddRow(Tier tier, bool deterministic = false) {
    batch_.AddDecodeRow(batch_.rows(), 5, 7, false, {tier, deterministic, 0});
  }
  void AddPrefillRow(Tier tier) { batch_.AddRow(batch_.rows(), 5, 7, false, tier); }

  // The input of layer `l`'s attention or MLP.
  Tensor Input(int32_t l, Tap at) const {
    return x_.View(0, DType::kFloat32, int64_t{2} * kLayers * kMaxRows, kHidden)
        .Rows((l * 2 + (at == Tap::kMlpNorm)) * kMaxRows, batch_.rows());
  }
  const float* TapOf(const LayerPredictorData& layer, int32_t l, int32_t row) const {
    return layer.tap == Tap::kPreviousLayer ? Input(l - 1, Tap::kMlpNorm).row<float>(row)
                                            : Input(l, layer.tap).row<float>(row);
  }
  LinearWeights Up(int32_t l) const {
    LinearWeights up;
    up.weight = up_.View(0, DType::kFloat32, kLayers * kFfn, kHidden).Rows(l * kFfn, kFfn);
    return up;
  }

  // Calls the predictor as the model does.
  StepResult Step() {
    StepResult result;
    const auto inputs = StepInputs::Create(*backend_, batch_, predictor_->input_words()).value();
    inputs->Begin(batch_);
    predictor_->BeginStep(batch_, *inputs);
    inputs->Send();
    for (int32_t l = 0; l < kLayers; ++l) {
      Ridden(l, Tap::kAttentionNorm, &result);
      result.heads.push_back(
          CopyOf(predictor_->SelectsHeads(l) ? predictor_->Heads(l) : Selection{}, batch_.rows(), kHeads));
      Ridden(l, Tap::kMlpNorm, &result);
      result.neurons.push_back(CopyOf(predictor_->Neurons(l), batch_.rows(), kFfn));
      predictor_->Audit(l, Input(l, Tap::kMlpNorm), Up(l));
      Ridden(l, Tap::kPreviousLayer, &result);
    }
    result.counts = predictor_->MakeCounts();
    predictor_->EndStep(&result.counts, /*wanted=*/true);
    backend_->Synchronize();
    predictor_->Complete(&result.counts);
    return result;
  }

  static std::vector<bool> Plain(const SelectorData& selector, Tier tier, const float* x, int32_t outputs) {
    const auto& point = selector.points[static_cast<size_t>(tier)];
    if (!point.has_value()) return std::vector<bool>(outputs, true);
    return SelectPlainly(selector, *point, x, kHidden).selected;
  }

  // That rows, list and counts of one layer's neurons or heads are what the data says.
  void ExpectPlain(const SelectorData& selector, const LayerPredictorData& layer, int32_t l, const Selected& selected,
                   const int32_t* counts, int32_t union_count, int32_t outputs) {
    std::vector<bool> any(outputs, false);
    for (int32_t r = 0; r < batch_.rows(); ++r) {
      const bool decodes = r < batch_.decode_rows;
      const std::vector<bool> plain =
          decodes ? Plain(selector, batch_.tiers[r], TapOf(layer, l, r), outputs) : std::vector<bool>(outputs, true);
      if (!selected.all) {
        EXPECT_EQ(selected.masks[r], plain) << "row " << r;
      }
      for (int32_t i = 0; i < outputs; ++i) any[i] = any[i] || plain[i];
      if (decodes) {
        EXPECT_EQ(counts[r], std::count(plain.begin(), plain.end(), true)) << "row " << r;
      }
    }
    std::vector<int32_t> list;
    for (int32_t i = 0; i < outputs; ++i) {
      if (any[i]) list.push_back(i);
    }
    if (!selected.all) {
      EXPECT_EQ(selected.list, list);
    }
    EXPECT_EQ(union_count, static_cast<int32_t>(list.size()));
  }
  void ExpectPlain(const PredictorData& data, const StepResult& result) {
    for (int32_t l = 0; l < kLayers; ++l) {
      SCOPED_TRACE(testing::Message() << "layer " << l);
      const LayerPredictorData& layer = data.layers[l];
      const StepCounts& counts = result.counts;
      ExpectPlain(layer.neurons, layer, l, result.neurons[l], &counts.selected[l * counts.decode_rows],
                  counts.union_selected[l], kFfn);
      ExpectPlain(layer.heads, layer, l, result.heads[l], &counts.heads[l * counts.decode_rows], counts.union_heads[l],
                  kHeads);
    }
  }

  const OptConfig config_ = SmallConfig();
  const std::unique_ptr<Backend> backend_;
  std::unique_ptr<Predictor> predictor_;
  Batch batch_;

 private:
  Buffer Integers(int64_t rows, int64_t cols, int largest, std::mt19937* random) {
    std::uniform_int_distribution<int> integer(-largest, largest);
    std::vector<float> values(rows * cols);
    for (float& value : values) value = static_cast<float>(integer(*random));
    Buffer buffer = backend_->Allocate(static_cast<int64_t>(values.size() * sizeof(float))).value();
    backend_->Upload(buffer.View(0, DType::kFloat32, rows, cols), values.data());
    return buffer;
  }
  void Ridden(int32_t l, Tap at, StepResult* result) {
    const Ride ride = predictor_->StageA(l, at);
    if (ride.w == nullptr) return;
    const bool at_attention = at == Tap::kAttentionNorm;
    backend_->Linear(ride.y, Input(l, at_attention ? at : Tap::kMlpNorm), *ride.w);
    result->ride_rows[{l, at}] = ride.w->outputs();
  }

  Buffer x_;   // float32 [layers * 2 * max rows, hidden]: the attention's inputs of a layer, then its MLP's
  Buffer up_;  // float32 [layers * ffn, hidden]
};

class PredictorTap : public PredictorTest, public testing::WithParamInterface<Tap> {};

TEST_P(PredictorTap, EveryRowSelectsWhatTheFileSaysForItsTier) {
  const PredictorData data = MakePredictor(config_, GetParam(), 1);
  Create(&data);
  for (const Tier tier : {Tier::kHigh, Tier::kDense, Tier::kFast, Tier::kBalanced, Tier::kExact, Tier::kHigh}) {
    AddRow(tier);
  }
  ExpectPlain(data, Step());  // with DENSE and EXACT rows, which take everything

  batch_.Clear();
  for (const Tier tier : {Tier::kFast, Tier::kBalanced, Tier::kFast}) AddRow(tier, tier == Tier::kFast);
  const StepResult result = Step();
  ExpectPlain(data, result);
  EXPECT_LT(*std::min_element(result.counts.union_selected.begin(), result.counts.union_selected.end()), kFfn)
      << "this step shows unions that are not everything";
  EXPECT_THAT(result.neurons[1].strict, testing::ElementsAre(1, 0, 1));
  if (GetParam() != Tap::kMlpNorm) {
    EXPECT_TRUE(result.heads[1].strict.empty()) << "every row computes its own heads";
  }

  batch_.Clear();
  AddRow(Tier::kFast);
  ExpectPlain(data, Step());

  batch_.Clear();
  AddRow(Tier::kFast);
  AddPrefillRow(Tier::kExact);
  AddPrefillRow(Tier::kFast);
  const StepResult with_prefill = Step();
  ExpectPlain(data, with_prefill);
  EXPECT_EQ(with_prefill.counts.union_selected[2], kFfn);
  EXPECT_EQ(with_prefill.neurons[2].strict[1], 0);
}

TEST_P(PredictorTap, OnlyTheComponentsThatAStepNeedsAreComputed) {
  const PredictorData data = MakePredictor(config_, GetParam(), 2);
  Create(&data);
  const int32_t heads = GetParam() == Tap::kMlpNorm ? 0 : kMadeHeadRank;
  const auto rides = [&](Tier tier, bool prefill) {
    batch_.Clear();
    if (prefill) {
      AddPrefillRow(tier);
    } else {
      AddRow(Tier::kExact);
      AddRow(tier);
    }
    return Step().ride_rows;
  };
  for (const Tier tier : {Tier::kHigh, Tier::kBalanced, Tier::kFast}) {
    const auto rows = rides(tier, false);
    ASSERT_EQ(rows.size(), static_cast<size_t>(kLayers));
    for (const auto& [where, count] : rows) {
      EXPECT_EQ(count, heads + data.layers[1].neurons.points[static_cast<size_t>(tier)]->rank);
    }
    EXPECT_TRUE(rides(tier, true).empty());
  }
  EXPECT_TRUE(rides(Tier::kDense, false).empty());
}

TEST_P(PredictorTap, ALayerThatIsSwitchedOffSelectsEverythingForThatTierOnly) {
  PredictorData data = MakePredictor(config_, GetParam(), 3);
  Create(&data);
  for (const Tier tier : {Tier::kFast, Tier::kHigh, Tier::kFast}) AddRow(tier);
  ExpectPlain(data, Step());
  predictor_->SwitchNeurons(1, Tier::kFast, false);
  predictor_->SwitchHeads(2, Tier::kHigh, false);
  PredictorData switched = data;
  switched.layers[1].neurons.points[static_cast<size_t>(Tier::kFast)].reset();
  switched.layers[2].heads.points[static_cast<size_t>(Tier::kHigh)].reset();
  ExpectPlain(switched, Step());
  EXPECT_TRUE(predictor_->HasNeuronPoint(1, Tier::kFast)) << "it can come back";
  predictor_->SwitchNeurons(1, Tier::kFast, true);
  predictor_->SwitchHeads(2, Tier::kHigh, true);
  ExpectPlain(data, Step());
}

// Whatever is switched off, and whatever the batch-mates want: an audit is about the row's own prediction.
TEST_P(PredictorTap, AnAuditComparesTheRowsOwnPredictionWithEverything) {
  PredictorData data = MakePredictor(config_, GetParam(), 4);
  for (LayerPredictorData& layer : data.layers) {
    for (int32_t j = 0; j < kFfn; ++j) layer.worth[j] = static_cast<float>(j % 5);
  }
  Create(&data);
  AddRow(Tier::kHigh);
  AddRow(Tier::kFast);
  AddRow(Tier::kExact);
  AddRow(Tier::kBalanced, /*deterministic=*/true);
  AddPrefillRow(Tier::kExact);
  batch_.audit_rows = {1, 3};
  for (const bool on : {true, false}) {
    for (int32_t l = 0; l < kLayers; ++l) {
      predictor_->SwitchNeurons(l, Tier::kFast, on);
      predictor_->SwitchNeurons(l, Tier::kBalanced, on);
    }
    const StepResult result = Step();
    for (int32_t l = 0; l < kLayers; ++l) {
      const LayerPredictorData& layer = data.layers[l];
      for (int32_t i = 0; i < 2; ++i) {
        const int32_t row = batch_.audit_rows[i];
        const std::vector<bool> plain = Plain(layer.neurons, batch_.tiers[row], TapOf(layer, l, row), kFfn);
        float expected[kAuditFields] = {};
        for (int32_t j = 0; j < kFfn; ++j) {
          float h = 0.0f;
          for (int32_t c = 0; c < kHidden; ++c) {
            h += Up(l).weight.row<float>(j)[c] * Input(l, Tap::kMlpNorm).row<float>(row)[c];
          }
          h = std::max(h, 0.0f);
          expected[kAuditSelected] += plain[j];
          expected[kAuditActive] += h != 0.0f;
          expected[kAuditHits] += plain[j] && h != 0.0f;
          expected[kAuditMass] += h * h * layer.worth[j];
          if (!plain[j]) expected[kAuditMissedMass] += h * h * layer.worth[j];
        }
        const float* found = result.counts.audit_of(l, i);
        EXPECT_EQ(std::vector<float>(found, found + kAuditFields),
                  std::vector<float>(expected, expected + kAuditFields))
            << "layer " << l << ", row " << row << (on ? "" : ", switched off");
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllTaps, PredictorTap,
                         testing::Values(Tap::kAttentionNorm, Tap::kMlpNorm, Tap::kPreviousLayer),
                         [](const auto& info) {
                           std::string name(Name(info.param));
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST_F(PredictorTest, LayersMayDifferInTapRankAndTiers) {
  PredictorData data = MakePredictor(config_, Tap::kAttentionNorm, 5);
  data.layers[1] = MakePredictor(config_, Tap::kMlpNorm, 6).layers[1];
  data.layers[2] = MakePredictor(config_, Tap::kPreviousLayer, 7).layers[2];
  data.layers[1].neurons.points[static_cast<size_t>(Tier::kBalanced)].reset();
  data.layers[2].heads = {};
  data.layers[0].heads.points[static_cast<size_t>(Tier::kHigh)].reset();
  Create(&data);
  for (const Tier tier : {Tier::kBalanced, Tier::kHigh, Tier::kFast}) {
    AddRow(tier);
    ExpectPlain(data, Step());
  }
  EXPECT_FALSE(predictor_->HasNeuronPoint(1, Tier::kBalanced));
  EXPECT_TRUE(predictor_->HasNeuronPoint(1, Tier::kHigh));

  data.layers[0].neurons = {};
  data.layers[1] = {Tap::kAttentionNorm, {}, {}, data.layers[1].worth, data.layers[1].frequency};
  Create(&data);
  const StepResult result = Step();
  ExpectPlain(data, result);
  EXPECT_TRUE(result.neurons[0].all && result.neurons[1].all && result.heads[1].all);
  EXPECT_FALSE(result.neurons[2].all);
}

TEST_F(PredictorTest, ThresholdsOfInfinitySelectAllOrNone) {
  PredictorData data = MakePredictor(config_, Tap::kAttentionNorm, 8);
  SelectOnly({0, 69}, Tier::kHigh, &data.layers[0].neurons);
  SelectOnly({}, Tier::kHigh, &data.layers[1].neurons);
  SelectOnly({4, 1, 2}, Tier::kHigh, &data.layers[0].heads);
  SelectOnly({}, Tier::kHigh, &data.layers[1].heads);
  for (SelectorData* selector : {&data.layers[2].neurons, &data.layers[2].heads}) SetThresholds(-INFINITY, selector);
  Create(&data);
  AddRow(Tier::kHigh);
  AddRow(Tier::kHigh, /*deterministic=*/true);
  const StepResult result = Step();
  EXPECT_THAT(result.neurons[0].list, testing::ElementsAre(0, 69));
  EXPECT_THAT(result.heads[0].list, testing::ElementsAre(1, 2, 4));
  EXPECT_THAT(result.neurons[1].list, testing::IsEmpty());
  EXPECT_THAT(result.heads[1].list, testing::IsEmpty());
  EXPECT_EQ(result.neurons[2].list.size(), static_cast<size_t>(kFfn));
  EXPECT_EQ(result.heads[2].list.size(), static_cast<size_t>(kHeads));
  EXPECT_EQ(result.counts.union_heads[0], 3);
  EXPECT_EQ(result.counts.selected_of(1, 1), 0);
}

// What the smaller one does not fill holds the old one's numbers: they must not be seen.
TEST_F(PredictorTest, AnotherIsPutInItsPlaceWhereThereIsRoom) {
  const Shard whole = Shard::Whole(config_);
  const PredictorData loaded = MakePredictor(config_, Tap::kAttentionNorm, 9);
  Create(&loaded);
  PredictorData smaller = MakePredictor(config_, Tap::kAttentionNorm, 10);
  smaller.layers[0].neurons.points[static_cast<size_t>(Tier::kHigh)].reset();
  smaller.layers[1].heads = {};
  smaller.layers[2] = {Tap::kAttentionNorm, {}, {}, {}, {}};
  {
    SelectorData& neurons = smaller.layers[1].neurons;
    --neurons.rank;
    neurons.a.resize(static_cast<size_t>(neurons.rank) * config_.hidden);
    neurons.a_scale.resize(neurons.rank);
    neurons.b.resize(static_cast<size_t>(neurons.rank) * config_.ffn);
    for (auto& point : neurons.points) {
      if (point.has_value()) point->rank = std::min(point->rank, neurons.rank);
    }
  }
  predictor_->SwitchNeurons(0, Tier::kFast, false);
  const int64_t bytes = predictor_->bytes();
  ASSERT_TRUE(predictor_->Reload(smaller, whole).ok());
  for (const Tier tier : {Tier::kFast, Tier::kHigh, Tier::kBalanced}) {
    AddRow(tier);
    ExpectPlain(smaller, Step());
  }
  EXPECT_FALSE(predictor_->HasNeuronPoint(0, Tier::kHigh));
  ASSERT_TRUE(predictor_->Reload(loaded, whole).ok());
  ExpectPlain(loaded, Step());
  EXPECT_EQ(predictor_->bytes(), bytes);
}

TEST_F(PredictorTest, AnotherThatHasNoRoomChangesNothing) {
  const Shard whole = Shard::Whole(config_);
  PredictorData loaded = MakePredictor(config_, Tap::kAttentionNorm, 11);
  loaded.layers[2].neurons.points[static_cast<size_t>(Tier::kHigh)].reset();
  Create(&loaded);
  AddRow(Tier::kFast);
  const auto expect_refused = [&](const PredictorData& other, const std::string& reason) {
    const absl::Status status = predictor_->Reload(other, whole);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr(reason));
    ExpectPlain(loaded, Step());
  };
  expect_refused(MakePredictor(config_, Tap::kMlpNorm, 12), "layer 0 reads mlp-norm");
  expect_refused(MakePredictor(config_, Tap::kAttentionNorm, 12), "layer 2 has 3 operating points for neurons");
  PredictorData larger = loaded;
  ++larger.layers[1].heads.rank;
  expect_refused(larger, "layer 1 has 4 components for heads; there is room for 3");
}

TEST_F(PredictorTest, WithoutDataEverythingIsSelectedAndNothingIsStored) {
  Create(nullptr);
  EXPECT_EQ(predictor_->bytes(), 0);
  EXPECT_FALSE(predictor_->HasNeuronPoint(0, Tier::kHigh));
  AddRow(Tier::kFast);
  AddRow(Tier::kDense);
  const StepResult result = Step();
  for (int32_t l = 0; l < kLayers; ++l) {
    EXPECT_TRUE(result.neurons[l].all && result.heads[l].all);
    EXPECT_EQ(result.counts.selected_of(l, 0), kFfn);
    EXPECT_EQ(result.counts.heads_of(l, 1), kHeads);
    EXPECT_EQ(result.counts.union_selected[l], kFfn);
  }
  EXPECT_TRUE(result.ride_rows.empty());
}

}  // namespace
}  // namespace dejavu
