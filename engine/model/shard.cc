#include "engine/model/shard.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"

namespace dejavu {
namespace {

// Each neuron of `order` goes to the rank that expects the least so far and still has room; without frequencies all
// weigh the same. The rank's own, ascending.
std::vector<int32_t> Deal(const std::vector<int32_t>& order, const std::vector<float>& frequency, int rank, int ranks) {
  const auto count = static_cast<int32_t>(order.size());
  std::vector<double> expected(ranks);
  std::vector<int32_t> room, own;
  for (int r = 0; r < ranks; ++r) room.push_back(Shard::RangeOf(count, r, ranks).count);
  for (const int32_t neuron : order) {
    int least = -1;
    for (int r = 0; r < ranks; ++r) {
      if (room[r] > 0 && (least < 0 || expected[r] < expected[least])) least = r;
    }
    --room[least];
    expected[least] += frequency.empty() ? 1.0 : frequency[neuron];
    if (least == rank) own.push_back(neuron);
  }
  std::sort(own.begin(), own.end());
  return own;
}

}  // namespace

Shard::Range Shard::RangeOf(int32_t count, int rank, int ranks) {
  const int32_t each = count / ranks, longer = count % ranks;
  return {rank * each + std::min(rank, longer), each + (rank < longer ? 1 : 0)};
}

Shard Shard::Whole(const ModelShape& shape) {
  Shard shard;
  shard.heads = {0, shape.heads};
  shard.vocab = {0, shape.vocab};
  shard.neuron_count = shape.ffn;
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

int64_t CountOf(const Runs& runs) {
  int64_t count = 0;
  for (const Shard::Range& run : runs) count += run.count;
  return count;
}

absl::StatusOr<Shard> MakeShard(const ModelShape& shape, const PredictorData* predictor, int rank, int ranks) {
  if (ranks < 1 || rank < 0 || rank >= ranks) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", rank, " of ", ranks, " ranks"));
  }
  if (ranks > std::min(shape.ffn, shape.vocab)) {
    return absl::InvalidArgumentError(absl::StrCat(ranks, " ranks for ", shape.ffn, " neurons and ", shape.vocab,
                                                   " tokens: each rank needs one of both"));
  }
  Shard shard = Shard::Whole(shape);
  if (ranks == 1) return shard;
  shard.rank = rank;
  shard.ranks = ranks;
  shard.heads = Shard::RangeOf(shape.heads, rank, ranks);
  shard.vocab = Shard::RangeOf(shape.vocab, rank, ranks);
  shard.neuron_count = Shard::RangeOf(shape.ffn, rank, ranks).count;
  std::vector<int32_t> order(shape.ffn);
  for (int32_t l = 0; l < shape.layers; ++l) {
    const std::vector<float> frequency = predictor != nullptr ? predictor->layers[l].frequency : std::vector<float>();
    std::iota(order.begin(), order.end(), 0);
    if (!frequency.empty()) {
      std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) { return frequency[x] > frequency[y]; });
    }
    shard.neurons.push_back(Deal(order, frequency, rank, ranks));
  }
  return shard;
}

}  // namespace dejavu
