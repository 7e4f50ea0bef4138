// How heads, neurons and the vocabulary are divided among ranks.
#include "engine/model/shard.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "engine/model/opt_config.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using testing::HasSubstr;

OptConfig Opt125m() {
  OptConfig config;
  config.hidden = config.embed = 768;
  config.layers = 2;
  config.heads = 12;
  config.head_dim = 64;
  config.ffn = 3072;
  config.vocab = 50272;
  config.context = 2048;
  return config;
}

// The hottest neurons side by side, as they are in no model: the worst case for slices.
PredictorData Skewed(const OptConfig& config) {
  PredictorData data;
  for (int32_t l = 0; l < config.layers; ++l) {
    std::vector<float>& frequency = data.layers.emplace_back().frequency;
    for (int32_t j = 0; j < config.ffn; ++j) {
      frequency.push_back(0.9f / (1.0f + 40.0f * static_cast<float>(j) / static_cast<float>(config.ffn)));
    }
  }
  return data;
}

std::vector<Shard> Group(const OptConfig& config, const PredictorData* predictor, int ranks) {
  std::vector<Shard> group;
  for (int rank = 0; rank < ranks; ++rank) group.push_back(MakeShard(config, predictor, rank, ranks).value());
  return group;
}

void ExpectRuns(const std::vector<Shard>& group, Shard::Range Shard::*range, int32_t count) {
  int32_t next = 0;
  for (const Shard& shard : group) {
    EXPECT_EQ((shard.*range).first, next) << "rank " << shard.rank;
    next += (shard.*range).count;
    EXPECT_LE((shard.*range).count, (group.front().*range).count) << "the first rank has no less than others";
    EXPECT_GE((shard.*range).count, (group.front().*range).count - 1);
  }
  EXPECT_EQ(next, count);
}

TEST(Shard, HeadsAndTokensGoInRunsAndEveryNeuronHasOneOwner) {
  const OptConfig config = Opt125m();
  const PredictorData skewed = Skewed(config);
  for (const PredictorData* predictor : {&skewed, static_cast<const PredictorData*>(nullptr)}) {
    for (const int ranks : {1, 2, 3, 5, 8, 16, 29}) {
      SCOPED_TRACE(testing::Message() << ranks << " ranks");
      const std::vector<Shard> group = Group(config, predictor, ranks);
      ExpectRuns(group, &Shard::heads, config.heads);
      ExpectRuns(group, &Shard::vocab, config.vocab);
      for (int32_t l = 0; l < config.layers; ++l) {
        std::vector<int> owners(config.ffn, 0);
        for (const Shard& shard : group) {
          int32_t last = -1, in_runs = 0;
          EXPECT_GE(shard.neuron_count, config.ffn / ranks);
          for (int32_t i = 0; i < shard.neuron_count; ++i) {
            EXPECT_GT(shard.neuron(l, i), last) << "ascending";
            last = shard.neuron(l, i);
            ++owners[last];
          }
          for (const Shard::Range& run : shard.NeuronRuns(l)) {
            for (int32_t j = run.first; j < run.first + run.count; ++j) EXPECT_EQ(j, shard.neuron(l, in_runs++));
          }
          EXPECT_EQ(in_runs, shard.neuron_count);
        }
        EXPECT_EQ(std::count(owners.begin(), owners.end(), 1), config.ffn);
      }
    }
  }
}

TEST(Shard, TwelveHeadsOverFiveRanks) {
  const std::vector<Shard> group = Group(Opt125m(), nullptr, 5);
  const std::vector<int32_t> expected = {3, 3, 2, 2, 2};
  for (int rank = 0; rank < 5; ++rank) EXPECT_EQ(group[rank].heads.count, expected[rank]);
  EXPECT_TRUE(group[0].first());
  EXPECT_FALSE(group[4].first());
}

TEST(Shard, RanksBeyondTheHeadsHaveNone) {
  const std::vector<Shard> group = Group(Opt125m(), nullptr, 16);
  EXPECT_EQ(group[11].heads.count, 1);
  EXPECT_EQ(group[12].heads.count, 0);
  EXPECT_EQ(group[15].heads.count, 0);
  EXPECT_EQ(group[15].neuron_count, 3072 / 16);
}

double Expected(const std::vector<float>& frequency, const Shard& shard, int32_t layer) {
  double sum = 0.0;
  for (int32_t i = 0; i < shard.neuron_count; ++i) sum += frequency[shard.neuron(layer, i)];
  return sum;
}

TEST(Shard, DealingBalancesWhatSlicesDoNot) {
  const OptConfig config = Opt125m();
  const PredictorData skewed = Skewed(config);
  const std::vector<float>& frequency = skewed.layers[1].frequency;
  const double all = std::accumulate(frequency.begin(), frequency.end(), 0.0);
  for (const int ranks : {2, 3, 5, 8}) {
    const double share = all / ranks;
    for (const Shard& shard : Group(config, &skewed, ranks)) {
      EXPECT_NEAR(Expected(frequency, shard, 1), share, 0.01 * share) << shard.rank << " of " << ranks;
    }
    const double first_slice = std::accumulate(frequency.begin(), frequency.begin() + config.ffn / ranks, 0.0);
    EXPECT_GT(first_slice, 1.5 * share) << ranks << " ranks";
  }
}

TEST(Shard, OneRankOwnsEverythingInPlace) {
  const OptConfig config = Opt125m();
  const PredictorData skewed = Skewed(config);
  const Shard shard = MakeShard(config, &skewed, 0, 1).value();
  EXPECT_TRUE(shard.whole());
  EXPECT_TRUE(shard.neurons.empty());
  ASSERT_EQ(shard.NeuronRuns(0).size(), 1u);
  EXPECT_EQ(shard.NeuronRuns(0)[0].count, config.ffn);
}

TEST(Shard, RefusesRanksThatCannotBe) {
  OptConfig config = Opt125m();
  for (const auto& [rank, ranks] : {std::pair(0, 0), std::pair(-1, 2), std::pair(2, 2)}) {
    EXPECT_EQ(MakeShard(config, nullptr, rank, ranks).status().code(), absl::StatusCode::kInvalidArgument);
  }
  config.ffn = 6;
  const absl::Status many = MakeShard(config, nullptr, 0, 7).status();
  EXPECT_EQ(many.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(many.message()), HasSubstr("7 ranks for 6 neurons"));
}

}  // namespace
}  // namespace dejavu
