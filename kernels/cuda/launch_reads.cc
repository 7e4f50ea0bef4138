// A function for each type of parameter. The type of the weights is in the kernel's name.
#include "kernels/cuda/launch_reads.h"

#include <algorithm>
#include <string_view>

#include "kernels/base/check.h"

namespace dejavu::cuda {
namespace {

constexpr int64_t kFloat = sizeof(float);

struct Launched {
  const DejavuCudaLaunch& launch;
  int64_t element;  // bytes of a weight, or of a key
  LaunchState& state;
};

constexpr int64_t ElementBytes(std::string_view kernel) {
  const auto has = [&](std::string_view type) { return kernel.find(type) != std::string_view::npos; };
  return has("F32") ? 4 : has("F16") ? 2 : has("I8") ? 1 : 0;  // bfloat16's name ends like float16's
}

int64_t Present(const void* vector) { return vector != nullptr ? kFloat : 0; }

LaunchReads Of(const EmbedParams& p, const Launched& l) {
  constexpr int64_t kElement[] = {4, 2, 2, 1};  // by WeightType
  const int64_t rows = l.launch.grid[1];
  return {.rows = rows,
          .weights = rows * (p.features * kElement[p.type] + Present(p.scale)),
          .activations = p.accumulate ? rows * p.features * kFloat : 0};
}

// Segments' sums are there because of how the launch before is cut: what must be read is the sum.
LaunchReads Of(const NormParams& p, const Launched&) {
  const int64_t inputs = p.add.data != nullptr ? 2 : 1;
  return {.weight = p.weight,
          .rows = p.rows,
          .weights = 2 * p.features * Present(p.weight),
          .activations = inputs * p.rows * p.features * kFloat};
}

LaunchReads Of(const NormSelectParams& p, const Launched& l) {
  LaunchReads reads = p.norm.rows > 0 ? Of(p.norm, l) : LaunchReads{};
  const int64_t rank = l.state.LargestRank(p.select);
  if (rank == 0) return reads;
  if (reads.weight == nullptr) reads.weight = p.select.b.data;
  reads.rows = p.select.rows;
  reads.weights += p.select.outputs * (rank + int64_t{sizeof(uint16_t)});  // and the thresholds of a point
  reads.activations += p.select.rows * rank * kFloat;
  return reads;
}

LaunchReads Of(const LinearParams& p, const Launched& l) {
  LaunchReads reads = {.weight = p.w.weight, .rows = p.rows, .activations = int64_t{p.rows} * p.inputs * kFloat};
  const int64_t row = p.inputs * l.element + Present(p.w.bias) + Present(p.w.scale);
  if (p.selected.list != nullptr) {
    reads.weights = reads.listed = int64_t{l.state.Selected(p.w.weight, p.selected.count)} * p.group * row;
  } else {
    reads.weights = p.w.outputs * row;
  }
  if (p.ride_blocks > 0) {
    reads.weights += p.ride.outputs * (p.inputs * int64_t{1} + Present(p.ride.bias) + Present(p.ride.scale));
  }
  return reads;
}

LaunchReads Of(const SumParams& p, const Launched& l) {
  const int64_t row = p.outputs * l.element + Present(p.scale);
  const int64_t bias = p.outputs * Present(p.sums.bias);
  LaunchReads reads = {.weight = p.weight, .rows = p.sums.rows};
  int64_t inputs = p.inputs;
  const bool chosen = p.selected.list != nullptr || p.skip_zeros != 0;
  if (p.selected.list != nullptr) inputs = int64_t{l.state.Selected(p.weight, p.selected.count)} * p.group;
  reads.activations = reads.rows * inputs * kFloat;
  if (p.skip_zeros != 0 && p.active != nullptr) inputs = l.state.Active(p.weight, p.active + p.counted);
  reads.weights = inputs * row + bias;
  reads.listed = chosen ? inputs * row : 0;
  if (p.norm.rows > 0) {
    reads.weights += 2 * p.norm.features * kFloat;
    reads.activations += p.norm.rows * p.norm.features * kFloat;
  }
  return reads;
}

LaunchReads OfJoinSums(const SumParams& p) {
  return {.rows = p.sums.rows, .activations = int64_t{p.sums.segments} * p.sums.rows * p.outputs * kFloat};
}

// Rows of different sequences, as decoding ones are. What a row has just computed itself need not be read back.
LaunchReads Of(const AttentionParams& p, const Launched& l) {
  const int64_t heads =
      p.selected.list != nullptr ? l.state.Selected(/*weight=*/nullptr, p.selected.count) : int64_t{p.heads};
  LaunchReads reads = {.rows = p.rows, .activations = p.rows * 3 * heads * p.head_dim * kFloat};
  for (int32_t row = 0; row < p.rows; ++row) {
    const int64_t positions = l.state.Position(p.positions + row) + (p.write != 0 ? 0 : 1);
    reads.keys_values += 2 * positions * heads * p.head_dim * l.element;
  }
  return reads;
}

LaunchReads Of(const AddParams& p, const Launched& l) {
  return {.rows = l.launch.grid[1], .activations = 2 * int64_t{l.launch.grid[1]} * p.features * kFloat};
}
LaunchReads Of(const GatherRowsParams& p, const Launched& l) {
  return {.rows = l.launch.grid[1], .activations = int64_t{l.launch.grid[1]} * p.features * kFloat};
}
LaunchReads Of(const AuditParams& p, const Launched& l) {
  return {.weight = p.worth,
          .rows = l.launch.grid[0],
          .weights = p.neurons * kFloat,
          .activations = int64_t{l.launch.grid[0]} * p.neurons * kFloat};
}
LaunchReads Of(const DrawParams& p, const Launched& l) {
  return {.rows = l.launch.grid[0], .activations = int64_t{l.launch.grid[0]} * p.count * kFloat};
}
LaunchReads Of(const SplitParams& p, const Launched& l) {
  return {.rows = l.launch.grid[1], .activations = int64_t{l.launch.grid[1]} * p.features * kFloat};
}
LaunchReads Of(const FinishGemmParams& p, const Launched& l) {
  return {.rows = l.launch.grid[1],
          .weights = p.features * Present(p.bias),
          .activations = int64_t{l.launch.grid[1]} * p.features * kFloat};
}
LaunchReads Of(const ReadSumParams& p, const Launched&) {
  return {.weight = p.data, .weights = p.vectors * int64_t{sizeof(uint32_t[4])}};
}

// Keys and values are written, nothing of them is read.
LaunchReads OfWriteKv(const AttentionParams& p, const DejavuCudaLaunch& launch) {
  const int64_t rows = launch.kernel == kWritePromptKv ? p.rows : launch.grid[2];
  return {.rows = rows, .activations = rows * 2 * p.heads * p.head_dim * kFloat};
}

}  // namespace

LaunchReads ReadsOf(const DejavuCudaLaunch& launch, LaunchState& state) {
  if (launch.kernel == kJoinSums) return OfJoinSums(*static_cast<const SumParams*>(launch.params));
  if (launch.kernel == kWriteKvF16 || launch.kernel == kWriteKvF32 || launch.kernel == kWritePromptKv) {
    return OfWriteKv(*static_cast<const AttentionParams*>(launch.params), launch);
  }
  switch (launch.kernel) {
#define DEJAVU_CUDA_KERNEL_READS(name, Params) \
  case k##name:                                \
    return Of(*static_cast<const Params*>(launch.params), {launch, ElementBytes(#name), state});
    DEJAVU_CUDA_KERNELS(DEJAVU_CUDA_KERNEL_READS)
#undef DEJAVU_CUDA_KERNEL_READS
  }
  CHECK(false) << "no kernel " << launch.kernel;
  return {};
}

LaunchReads ReadsOf(const DejavuCudaGemm& g) {
  constexpr int64_t kElement = 2;
  return {.weight = g.b, .rows = g.m, .weights = g.n * g.k * kElement, .activations = g.m * g.k * kElement};
}

}  // namespace dejavu::cuda
