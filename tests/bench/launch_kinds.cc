#include "tests/bench/launch_kinds.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/kernel_params.h"

namespace dejavu {
namespace {

cuda::LaunchReads ReadsOf(const TracedLaunch& traced, cuda::LaunchState& state) {
  if (traced.gemm.has_value()) return cuda::ReadsOf(*traced.gemm);
  DejavuCudaLaunch launch = traced.launch;
  launch.params = traced.params.data();
  return cuda::ReadsOf(launch, state);
}

void Add(const cuda::LaunchReads& reads, cuda::LaunchReads* sum) {
  sum->weight = reads.weight;
  sum->rows = std::max(sum->rows, reads.rows);
  sum->weights += reads.weights;
  sum->listed += reads.listed;
  sum->keys_values += reads.keys_values;
  sum->activations += reads.activations;
}

std::string NameOf(const TracedLaunch& traced, const void* weight, const WeightUses& uses) {
  const std::string kernel =
      traced.gemm.has_value() ? "library" : cuda::NameOf(static_cast<cuda::Kernel>(traced.launch.kernel));
  const auto use = uses.find(weight);
  return use == uses.end() ? kernel : absl::StrCat(kernel, " ", use->second.name);
}

bool SameShape(const DejavuCudaLaunch& a, const DejavuCudaLaunch& b) {
  return std::ranges::equal(a.grid, b.grid) && std::ranges::equal(a.block, b.block) && a.shared_bytes == b.shared_bytes;
}

}  // namespace

WeightUses UsesOf(const OptWeights& weights) {
  WeightUses uses;
  for (size_t l = 0; l < weights.layers.size(); ++l) {
    const LayerWeights& layer = weights.layers[l];
    const auto number = static_cast<int32_t>(l);
    uses[layer.attention_norm.weight.data] = {"attention norm", number};
    uses[layer.mlp_norm.weight.data] = {"mlp norm", number};
    uses[layer.qkv.weight.data] = {"qkv", number};
    // K and V alone, where heads are chosen.
    const int64_t third = layer.qkv.weight.rows / 3;
    if (third > 0) uses[layer.qkv.weight.Rows(third, third).data] = {"kv", number};
    uses[layer.out.weight.data] = {"out", number};
    uses[layer.mlp.up.weight.data] = {"up", number};
    uses[layer.mlp.down.weight.data] = {"down", number};
  }
  uses[weights.final_norm.weight.data] = {"final norm"};
  uses[weights.project_in.weight.data] = {"project in"};
  uses[weights.project_out.weight.data] = {"project out"};
  uses[weights.head.weight.data] = {"head"};
  uses.erase(nullptr);
  return uses;
}

std::vector<LaunchKind> KindsOf(const std::vector<TracedLaunch>& step, const WeightUses& uses,
                                cuda::LaunchState& state) {
  std::vector<LaunchKind> kinds;
  for (size_t place = 0; place < step.size(); ++place) {
    const cuda::LaunchReads reads = ReadsOf(step[place], state);
    const std::string name = NameOf(step[place], reads.weight, uses);
    auto kind = std::find_if(kinds.begin(), kinds.end(), [&](const LaunchKind& k) {
      return k.name == name && SameShape(k.shape, step[place].launch);
    });
    if (kind == kinds.end()) {
      kinds.push_back({.name = name, .shape = step[place].launch, .places = {}, .reads = {}});
      kind = kinds.end() - 1;
      kind->shape.params = nullptr;
    }
    kind->places.push_back(place);
    Add(reads, &kind->reads);
  }
  return kinds;
}

cuda::LaunchReads ReadsOf(const std::vector<TracedLaunch>& step, const std::vector<size_t>& places,
                          cuda::LaunchState& state) {
  cuda::LaunchReads sum;
  for (const size_t place : places) Add(ReadsOf(step[place], state), &sum);
  return sum;
}

}  // namespace dejavu
