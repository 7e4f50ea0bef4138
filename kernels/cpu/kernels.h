// The CPU backend's inner loops, compiled for every SIMD target of the architecture and chosen at run time. Each
// function does a part of an op (some rows, outputs or columns), so that the backend can hand parts to threads; parts
// may run at the same time. A test forces a target with hwy::SetSupportedTargetsForTest(mask) followed by
// hwy::GetChosenTarget().Update(hwy::SupportedTargets()).
//
// How sums stay the same: a dot product keeps one vector accumulator per (row, output), goes through the inputs in
// order, and reduces at the end; a sum of rows is one fused multiply-add after the other per output, in input order,
// from zero, for each segment of inputs, and then the segments are added in order. Tiles only decide which of these run
// side by side. Adding an input whose activation is zero changes no bit (weights are finite), so leaving such inputs
// out gives the same result. With int8 weights the activations become int16 and what is added are integers, exactly.
#ifndef KERNELS_CPU_KERNELS_H_
#define KERNELS_CPU_KERNELS_H_

#include <cstdint>

#include "kernels/backend.h"

namespace dejavu::cpu {

// A thread's own memory for a call, 64-byte aligned.
constexpr int64_t kScratchBytes = 320 << 10;

// Activations for int8 weights: x[r][i] = scale[r] * q[r][i], rounded, |q| <= kQuantizedMost, scale a power of two. So
// kQuantizedBlock products with int8 weights add up in int32. Rows are padded with kQuantizedPadding zeros. What is
// below 2^-100 counts as zero.
constexpr int kQuantizedBits = 14;
constexpr int32_t kQuantizedMost = (1 << kQuantizedBits) - 1;
constexpr int64_t kQuantizedBlock = 1024;
constexpr int64_t kQuantizedPadding = 64;
struct Quantized {
  const int16_t* q;  // [rows, stride]
  int64_t stride;
  const float* scale;  // [rows]
};
// Row r of x, element list[i] (nullptr: i) times factor (nullptr: 1) of the same number, to q[i] for i < count.
void Quantize(const float* x, const float* factor, const int32_t* list, int64_t count, int16_t* q, float* scale);

// bfloat16 weights are widened two vectors at a time, the even ones of a step first: the lanes of a vector times two.
// Inputs per step for kOutputRows; 1: x stays as it is.
int64_t DotStepInputs(DType weights);
// A row of x in that order, padded with zeros to whole steps.
void PutInSteps(const float* x, int64_t inputs, float* to);

// y = W x + b for kOutputRows, then ReLU if asked for.
struct DotJob {
  Tensor y;                // [rows, outputs of w]
  Tensor x;                // [rows, inputs], in steps
  const LinearWeights* w;  // [outputs, inputs]
  const int32_t* outputs;  // which outputs; nullptr: all
  bool relu;
  Quantized quantized;  // x, for int8
  // The list is this one's, and what a strict row did not select itself may stay as it was. nullptr: every row needs
  // every output.
  const Selection* selected = nullptr;
};
// The outputs at `first` ... `last` of the list. NaN passes ReLU.
void DotProducts(const DotJob& job, int64_t first, int64_t last, float* scratch);

// y = W x + b for kInputRows over a list of inputs.
struct SumJob {
  Tensor y;                // [rows, outputs]
  Tensor x;                // [rows, inputs of w]
  const LinearWeights* w;  // [inputs, outputs]
  const int32_t* inputs;   // which inputs, ascending; nullptr: 0 ... count
  int64_t count;
  int64_t segments;
  const int64_t* bounds;  // [segments + 1] where in the list each segment begins; the last is `count`
  float* sums;            // [segments, rows, sums_stride] of each segment, where segments are summed apart
  int64_t sums_stride;
  Quantized quantized;  // x by position in the list, times the factors of the inputs, for int8
};
// The inputs of a segment, whole ones from 0 on.
int64_t SegmentInputs(int64_t inputs);
constexpr int64_t kColumnGrain = 64;  // ranges of columns start at multiples of it

// Few rows: each segment by itself into `sums`, then all of them together into y. Many: columns of y at once.
constexpr int64_t kSegmentRows = 16;
void SumSegment(const SumJob& job, int64_t segment, int64_t first, int64_t last, float* scratch);
void JoinSegments(const SumJob& job, int64_t first, int64_t last, float* scratch);
void SumColumns(const SumJob& job, int64_t first, int64_t last, float* scratch);

// Which outputs each row selects; see SelectorWeights. The sums are those of a SumJob with the stage as its weights.
struct SelectJob {
  const SumJob& sums;
  const SelectorWeights& w;
  const int32_t* points;  // [rows]
  Tensor masks;           // int32 [rows, words] of 32 outputs
};
// The columns `first` ... `last`, multiples of kSelectorPadding, of every row.
void SelectColumns(const SelectJob& job, int64_t first, int64_t last, float* scratch);

// Puts the keys and values of one position, [heads * head_dim] each, into place `place` of a block. Returns how many of
// them were beyond the range of its type.
int64_t StoreKv(const KvLayer& kv, int64_t block, int64_t place, const float* keys, const float* values);

struct AttentionJob {
  Tensor context;  // [rows, heads * head_dim]
  Tensor qkv;      // [rows, 3 * heads * head_dim]
  KvLayer kv;
  RowTable rows;
  float scale;
};
constexpr int kAttentionRows = 16;
constexpr int kAttentionHeads = 16;
// `count` heads, at most kAttentionHeads, of rows `first` ... `last`, at most kAttentionRows and all of one sequence,
// which share each visit to K and V.
void Attend(const AttentionJob& job, int64_t first, int64_t last, const int32_t* heads, int64_t count);

// Rows `first` ... `last` of the Backend op of the same name.
void Embed(const Tensor& y, const Tensor& ids, const Tensor& drawn, const EmbeddingWeights& table, int64_t offset,
           bool accumulate, int64_t first, int64_t last);
void LayerNorm(const Tensor& y, const Tensor& x, const NormWeights& norm, int64_t first, int64_t last);
void Add(const Tensor& x, const Tensor& y, int64_t first, int64_t last);
// A row; `draw` has kDrawFields.
int32_t Draw(const float* logits, int64_t count, Candidates candidates, const int32_t* draw, float* best);

}  // namespace dejavu::cpu

#endif  // KERNELS_CPU_KERNELS_H_
