// What the ranks of a group select, each with its share of the predictor, held against what the whole predictor
// selects.
#include <cstdint>
#include <random>
#include <vector>

#include "engine/model/predictor.h"
#include "engine/model/shard.h"
#include "gtest/gtest.h"
#include "tests/engine/cpu.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/random_predictor.h"

namespace dejavu {
namespace {

constexpr int32_t kLayers = 3, kHidden = 20, kHeads = 5, kFfn = 70, kRows = 6;

OptConfig SmallConfig() {
  OptConfig config;
  config.layers = kLayers;
  config.hidden = kHidden;
  config.heads = kHeads;
  config.head_dim = kHidden / kHeads;
  config.ffn = kFfn;
  config.vocab = 50;
  return config;
}

// Which outputs each row computes, by layer: [layer][row][output].
using Masks = std::vector<std::vector<std::vector<bool>>>;

struct Chosen {
  Masks heads, neurons;
  StepCounts counts;
};

std::vector<std::vector<bool>> MasksOf(const Selection& selection, int32_t outputs) {
  std::vector<std::vector<bool>> masks(kRows, std::vector<bool>(outputs, true));
  if (selection.all()) return masks;
  for (int32_t r = 0; r < kRows; ++r) {
    for (int32_t i = 0; i < outputs; ++i) {
      masks[r][i] = (static_cast<uint32_t>(selection.masks.row<int32_t>(r)[i / 32]) >> (i % 32) & 1) != 0;
    }
  }
  return masks;
}

// A step of a predictor for `shard` over rows of `x` in every tier, in the order in which the model calls it.
Chosen Choose(const PredictorData& data, const Shard& shard, Tensor x) {
  const auto predictor = Predictor::Create(&data, SmallConfig(), shard, Cpu(), kRows, 0).value();
  Batch batch(kRows, kRows, kRows, 1);
  for (const Tier tier : {Tier::kHigh, Tier::kBalanced, Tier::kFast, Tier::kExact, Tier::kBalanced, Tier::kFast}) {
    batch.AddDecodeRow(batch.rows(), 5, 7, false, {tier, false, 0});
  }
  Chosen chosen;
  const auto ride = [&](int32_t l, Tap at) {
    const Ride riding = predictor->StageA(l, at);
    if (riding.w != nullptr) Cpu().Linear(riding.y, x, *riding.w);
  };
  const auto inputs = StepInputs::Create(Cpu(), batch, predictor->input_words()).value();
  inputs->Begin(batch);
  predictor->BeginStep(batch, *inputs);
  inputs->Send();
  for (int32_t l = 0; l < kLayers; ++l) {
    ride(l, Tap::kAttentionNorm);
    if (shard.heads.count == 0) {
      EXPECT_FALSE(predictor->SelectsHeads(l));
    }
    chosen.heads.push_back(MasksOf(predictor->SelectsHeads(l) ? predictor->Heads(l) : Selection{}, shard.heads.count));
    ride(l, Tap::kMlpNorm);
    chosen.neurons.push_back(MasksOf(predictor->Neurons(l), shard.neuron_count));
    ride(l, Tap::kPreviousLayer);
  }
  chosen.counts = predictor->MakeCounts();
  predictor->EndStep(&chosen.counts, /*wanted=*/true);
  Cpu().Synchronize();
  predictor->Complete(&chosen.counts);
  return chosen;
}

class ShardedPredictor : public testing::TestWithParam<Tap> {};

TEST_P(ShardedPredictor, RanksTogetherSelectWhatTheWholeSelects) {
  const OptConfig config = SmallConfig();
  const PredictorData data = MakePredictor(config, GetParam(), 1), dealing = RandomFrequencies(config, 2);
  std::mt19937 random(11);
  std::uniform_int_distribution<int> integer(-4, 4);
  std::vector<float> values(kRows * kHidden);
  for (float& value : values) value = static_cast<float>(integer(random));
  const Buffer memory = Cpu().Allocate(static_cast<int64_t>(values.size() * sizeof(float))).value();
  const Tensor x = memory.View(0, DType::kFloat32, kRows, kHidden);
  Cpu().Upload(x, values.data());
  const Chosen whole = Choose(data, Shard::Whole(config), x);
  for (const int ranks : {1, 2, 3, 7}) {  // of the seven, two have no head
    std::vector<int32_t> heads(whole.counts.heads.size(), 0), neurons(whole.counts.selected.size(), 0);
    for (int rank = 0; rank < ranks; ++rank) {
      SCOPED_TRACE(testing::Message() << "rank " << rank << " of " << ranks);
      const Shard shard = *MakeShard(config, &dealing, rank, ranks);
      const Chosen own = Choose(data, shard, x);
      for (int32_t l = 0; l < kLayers; ++l) {
        for (int32_t r = 0; r < kRows; ++r) {
          for (int32_t i = 0; i < shard.heads.count; ++i) {
            EXPECT_EQ(own.heads[l][r][i], whole.heads[l][r][shard.heads.first + i]) << l << ' ' << r << ' ' << i;
          }
          for (int32_t i = 0; i < shard.neuron_count; ++i) {
            EXPECT_EQ(own.neurons[l][r][i], whole.neurons[l][r][shard.neuron(l, i)]) << l << ' ' << r << ' ' << i;
          }
        }
      }
      for (size_t i = 0; i < heads.size(); ++i) heads[i] += own.counts.heads[i];
      for (size_t i = 0; i < neurons.size(); ++i) neurons[i] += own.counts.selected[i];
    }
    EXPECT_EQ(heads, whole.counts.heads) << ranks << " ranks";
    EXPECT_EQ(neurons, whole.counts.selected) << ranks << " ranks";
  }
  EXPECT_LT(whole.counts.selected[kRows + 2], kFfn) << "something is left out";
}

INSTANTIATE_TEST_SUITE_P(EveryTap, ShardedPredictor,
                         testing::Values(Tap::kAttentionNorm, Tap::kMlpNorm, Tap::kPreviousLayer));

}  // namespace
}  // namespace dejavu
