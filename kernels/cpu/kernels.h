// The CPU backend's inner loops, compiled for every SIMD target of the architecture and chosen at run time. Each
// function does a part of an op (some rows, outputs or columns), so that the backend can hand parts to threads; parts
// may run at the same time. A test forces a target with hwy::SetSupportedTargetsForTest(mask) followed by
// hwy::GetChosenTarget().Update(hwy::SupportedTargets()).
//
// How sums stay the same: a dot product keeps one vector accumulator per (row, output), goes through the inputs in
// order, and reduces at the end; a sum of rows is one fused multiply-add after the other per output, in input order,
// from zero. Tiles only decide which of these run side by side. Adding an input whose activation is zero changes no bit
// (weights are finite), so leaving such inputs out gives the same result.
#ifndef KERNELS_CPU_KERNELS_H_
#define KERNELS_CPU_KERNELS_H_

#include <cstdint>

#include "kernels/backend.h"

namespace dejavu::cpu {

const char* TargetName();

// y = W x + b for kOutputRows, then ReLU if asked for.
struct DotJob {
  Tensor y;                // [rows, outputs of w]
  Tensor x;                // [rows, inputs]
  const LinearWeights* w;  // [outputs, inputs]
  const int32_t* outputs;  // which outputs; nullptr: all
  bool relu;
};
// The outputs at `first` ... `last` of the list. NaN passes ReLU.
void DotProducts(const DotJob& job, int64_t first, int64_t last);

// y = W x + b for kInputRows over a list of inputs.
struct SumJob {
  Tensor y;                // [rows, outputs]
  Tensor x;                // [rows, inputs of w]
  const LinearWeights* w;  // [inputs, outputs]
  const int32_t* inputs;   // which inputs, ascending; nullptr: 0 ... count
  int64_t count;
};
constexpr int64_t kSumScratchBytes = 32 << 10;
// The columns `first` ... `last`. `scratch` is the calling thread's own, 64-byte aligned.
void SumRows(const SumJob& job, int64_t first, int64_t last, float* scratch);

// Which outputs each row selects; see SelectorWeights. A word holds 32 outputs.
struct SelectJob {
  Tensor a;  // [rows, coordinates]
  SelectorWeights w;
  const int32_t* points;  // [rows]
  Tensor masks;           // int32 [rows, words]
};
constexpr int64_t kBlockWords = kSelectorPadding / 32;
// The blocks of kBlockWords words from `first` to `last`, for every row.
void SelectBlocks(const SelectJob& job, int64_t first, int64_t last);

struct AttentionJob {
  Tensor context;  // [rows, heads * head_dim]
  Tensor qkv;      // [rows, 3 * heads * head_dim]
  KvLayer kv;
  RowTable rows;
  float scale;
};
constexpr int kAttentionRows = 16;
// One head of rows `first` ... `last`, at most kAttentionRows and all of one sequence, which share each visit to K and
// V.
void Attend(const AttentionJob& job, int64_t first, int64_t last, int64_t head);

// Rows `first` ... `last` of the Backend op of the same name.
void Embed(const Tensor& y, const Tensor& ids, const EmbeddingWeights& table, int64_t offset, bool accumulate,
           int64_t first, int64_t last);
void LayerNorm(const Tensor& y, const Tensor& x, const NormWeights& norm, int64_t first, int64_t last);
void Add(const Tensor& x, const Tensor& y, int64_t first, int64_t last);

}  // namespace dejavu::cpu

#endif  // KERNELS_CPU_KERNELS_H_
