#include "engine/shard.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"

namespace dejavu {
namespace {

// Back and forth through the ranks, so that none always gets the more frequent of its round. The last round, if it is
// not full, goes forth: the first ranks have the longer lists, as RangeOf has it.
std::vector<int32_t> Deal(const std::vector<int32_t>& order, int rank, int ranks) {
  std::vector<int32_t> own;
  const auto count = static_cast<int32_t>(order.size());
  for (int32_t round = 0; round * ranks < count; ++round) {
    const bool full = (round + 1) * ranks <= count;
    const int32_t place = round * ranks + (full && round % 2 == 1 ? ranks - 1 - rank : rank);
    if (place < count) own.push_back(order[place]);
  }
  std::sort(own.begin(), own.end());
  return own;
}

}  // namespace

Shard::Range Shard::RangeOf(int32_t count, int rank, int ranks) {
  const int32_t each = count / ranks, longer = count % ranks;
  return {rank * each + std::min(rank, longer), each + (rank < longer ? 1 : 0)};
}

Shard Shard::Whole(const OptConfig& config) {
  Shard shard;
  shard.heads = {0, config.heads};
  shard.vocab = {0, config.vocab};
  shard.neuron_count = config.ffn;
  return shard;
}

std::vector<Shard::Range> Shard::NeuronRuns(int32_t layer) const {
  if (neurons.empty()) return {{0, neuron_count}};
  std::vector<Range> runs;
  for (const int32_t id : neurons[layer]) {
    if (runs.empty() || id != runs.back().first + runs.back().count) runs.push_back({id, 0});
    ++runs.back().count;
  }
  return runs;
}

absl::StatusOr<Shard> MakeShard(const OptConfig& config, const PredictorData* predictor, int rank, int ranks) {
  if (ranks < 1 || rank < 0 || rank >= ranks) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", rank, " of ", ranks, " ranks"));
  }
  if (ranks > std::min(config.ffn, config.vocab)) {
    return absl::InvalidArgumentError(absl::StrCat(ranks, " ranks for ", config.ffn, " neurons and ", config.vocab,
                                                   " tokens: each rank needs one of both"));
  }
  Shard shard = Shard::Whole(config);
  if (ranks == 1) return shard;
  shard.rank = rank;
  shard.ranks = ranks;
  shard.heads = Shard::RangeOf(config.heads, rank, ranks);
  shard.vocab = Shard::RangeOf(config.vocab, rank, ranks);
  shard.neuron_count = Shard::RangeOf(config.ffn, rank, ranks).count;
  std::vector<int32_t> order(config.ffn);
  for (int32_t l = 0; l < config.layers; ++l) {
    std::iota(order.begin(), order.end(), 0);
    if (predictor != nullptr && !predictor->layers[l].frequency.empty()) {
      const std::vector<float>& frequency = predictor->layers[l].frequency;
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return frequency[a] > frequency[b]; });
    }
    shard.neurons.push_back(Deal(order, rank, ranks));
  }
  return shard;
}

}  // namespace dejavu
