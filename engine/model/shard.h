// Shard: what one rank of a tensor-parallel group owns of a model. Heads and neurons are divided, each rank predicts,
// selects and computes its own, and the residual stream is summed over the ranks twice per layer (Megatron-LM, arXiv
// 1909.08053, section 3). The vocabulary is divided in one run of ids each.
#ifndef ENGINE_MODEL_SHARD_H_
#define ENGINE_MODEL_SHARD_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/predictor_data.h"
#include "engine/model_shape.h"

namespace dejavu {

struct Shard {
  struct Range {
    int32_t first = 0;
    int32_t count = 0;
  };

  int rank = 0;
  int ranks = 1;
  Range heads;  // none where there are more ranks than heads
  Range vocab;
  int32_t neuron_count = 0;                   // of every layer
  std::vector<std::vector<int32_t>> neurons;  // [layers][neuron_count] ids, ascending; empty: those are all

  static Shard Whole(const ModelShape& shape);

  // Rank's part of `count` heads or ids: runs whose lengths differ by at most one, the longer first.
  static Range RangeOf(int32_t count, int rank, int ranks);

  bool whole() const { return ranks == 1; }
  // The id of the i-th own neuron of `layer`, and all of them as runs of ids.
  int32_t neuron(int32_t layer, int32_t i) const { return neurons.empty() ? i : neurons[layer][i]; }
  std::vector<Range> NeuronRuns(int32_t layer) const;
  // What a rank has that the others need not have: biases that are added once.
  bool first() const { return rank == 0; }
};

// Rows or columns of a matrix, or elements of a vector, ascending.
using Runs = std::vector<Shard::Range>;

int64_t CountOf(const Runs& runs);

// How rank `rank` of `ranks` divides up `config`. Heads and vocabulary go in runs whose lengths differ by at most one,
// the longer first. Neurons are dealt by `predictor`'s frequencies, so that each rank expects to compute as many as the
// others: from the most frequent on, to the rank that has least. Without a predictor (nullptr), or for layers where it
// has no frequencies, in turn. INVALID_ARGUMENT where there are more ranks than neurons or ids, or the rank is none of
// them.
absl::StatusOr<Shard> MakeShard(const ModelShape& shape, const PredictorData* predictor, int rank, int ranks);

}  // namespace dejavu

#endif  // ENGINE_MODEL_SHARD_H_
