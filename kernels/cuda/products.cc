#include "kernels/cuda/products.h"

#include <algorithm>
#include <iterator>

#include "kernels/base/check.h"
#include "kernels/base/round.h"
#include "kernels/cuda/kernel_params.h"

namespace dejavu::cuda {
namespace {

constexpr int64_t kSumRows = 64;           // at once of a Sum, whose scratch grows with the rows,
constexpr int64_t kSumLaunches = 8;        // unless that were more launches than these
constexpr int64_t kSumSegments = 32;       // at most, so many blocks share the inputs
constexpr int64_t kSumSegmentInputs = 64;  // a multiple of it
constexpr int64_t kSumBlocks = 264;        // about, of one group of rows: what a large GPU does at once
constexpr int64_t kSumOwnRows = 3;         // up to so many the last block of a slab joins the segments
constexpr int64_t kGemmRows = 33;          // from so many rows on a product is the library's
constexpr int64_t kStackedRows = 256;      // up to so many the weights are what it waits for

}  // namespace

bool Products::TakesGemm(const Tensor& x, const LinearWeights& w, const Selection& selected) {
  const DType dtype = w.weight.dtype;
  return x.rows >= kGemmRows && selected.all() && (dtype == DType::kFloat16 || dtype == DType::kBFloat16);
}

// In two products, of the upper and the lower halves of x, so that x keeps its precision. Of few rows it is one product
// of twice the rows, which reads the weights once, and the halves are added afterwards; of more rows the second product
// adds to the first, and the library does the rest in the same launch.
void Products::Gemm(const GemmJob& job) {
  const LinearWeights& w = job.w;
  const int64_t rows = job.x.rows, outputs = w.outputs();
  const bool bfloat16 = w.weight.dtype == DType::kBFloat16, stacked = rows <= kStackedRows;
  const int64_t stride = RoundUp(job.x.cols, kVectorBytes / SizeOf(w.weight.dtype));
  const SplitParams split = SplitInput(job, stride);
  queue_.Launch(bfloat16 ? kSplitBF16 : kSplitF16, {DivideUp(job.x.cols, kSplitFeatures), rows}, 0, split);

  float* const sums = stacked ? scratch_.Partial<float>(2 * rows * outputs) : VectorFrom<float>(job.y);
  DejavuCudaGemm gemm = {.a = split.high.data,
                         .b = w.weight.data,
                         .c = sums,
                         .m = stacked ? 2 * rows : rows,
                         .n = outputs,
                         .k = w.inputs(),
                         .a_stride = stride,
                         .b_stride = w.weight.stride,
                         .c_stride = stacked ? outputs : job.y.stride,
                         .bfloat16 = bfloat16,
                         .b_is_kn = w.layout == LinearWeights::Layout::kInputRows,
                         .accumulate = false,
                         .relu = false,
                         .bias = nullptr};
  queue_.Try(queue_.module().gemm(queue_.context(), &gemm), "product of many rows");
  if (!stacked) {
    gemm.a = split.low.data;
    gemm.accumulate = true;
    gemm.bias = VectorFrom<float>(w.bias);
    gemm.relu = job.relu;
    queue_.Try(queue_.module().gemm(queue_.context(), &gemm), "product of many rows");
    return;
  }
  const bool vectors = outputs % 4 == 0 && HasVectors(job.y) && (w.bias.empty() || HasVectors(w.bias));
  const FinishGemmParams finish = {.y = MatrixFrom<float>(job.y),
                                   .high = {sums, outputs},
                                   .low = {sums + rows * outputs, outputs},
                                   .bias = VectorFrom<float>(w.bias),
                                   .features = Int(outputs),
                                   .relu = job.relu,
                                   .vectors = vectors};
  queue_.Launch(kFinishGemm, {DivideUp(outputs, kFinishFeatures), rows}, 0, finish);
}

SplitParams Products::SplitInput(const GemmJob& job, int64_t stride) {
  const Tensor& x = job.x;
  uint16_t* const halves = scratch_.Halves(2 * x.rows * stride);
  SplitParams p = {};
  p.x = MatrixFrom<const float>(x);
  p.high = {halves, stride};
  p.low = {halves + x.rows * stride, stride};
  p.features = Int(x.cols);
  p.vectors = x.cols % kSplitPiece == 0 && HasVectors(x);
  p.cleared = VectorFrom<int32_t>(job.cleared);
  p.cleared_count = Int(job.cleared.cols);
  if (job.active.empty()) return p;
  p.active = VectorFrom<int32_t>(job.active);
  p.counted = Int(job.active.cols - 1);
  p.ticket = scratch_.Tickets(1 + DivideUp(x.cols, 32));
  p.in_any = p.ticket + 1;
  return p;
}

OutputRows Products::RowsOf(const LinearWeights& w, const Tensor& y, const RowFragments& x) {
  CHECK(w.outputs() > 0 && w.inputs() > 0) << w.outputs() << " outputs of " << w.inputs() << " inputs";
  return {.weight = w.weight.data,
          .stride = w.weight.stride,
          .bias = VectorFrom<float>(w.bias),
          .scale = VectorFrom<float>(w.scale),
          .y = MatrixFrom<float>(y),
          .x = w.weight.dtype == DType::kInt8 ? x.integers : x.halves,
          .outputs = Int(w.outputs()),
          .vectors = HasVectors(w.weight)};
}

// One block a multiprocessor, each with as many outputs as the others; those of `ride` get their share by bytes.
void Products::Multiply(const Job& job) {
  constexpr Kernel kKernels[][2] = {{kLinearF32, kLinearF32},
                                    {kLinearF16x8, kLinearF16x16},
                                    {kLinearBF16x8, kLinearBF16x16},
                                    {kLinearI8x8, kLinearI8x16}};
  constexpr int64_t kLeastOutputs = 8;  // of a block
  const int64_t groups = DivideUp(job.x.rows, kLinearRows);
  if (groups == 0) return;
  const WeightType type = TypeOf(job.w.weight.dtype);
  const bool rides = job.ride.w != nullptr;
  FragmentStore::Forms forms = FragmentStore::FormsOf(job.w.weight.dtype);
  forms.integers = forms.integers || rides;
  const RowFragments x = fragments_.Of(job.x, forms);

  LinearParams p = {};
  p.x = MatrixFrom<const float>(job.x);
  p.rows = Int(job.x.rows);
  p.inputs = Int(job.x.cols);
  p.relu = job.relu;
  p.group = Int(job.group);
  p.w = RowsOf(job.w, job.y, x);
  p.selected = job.selected;
  p.list_early = queue_.IsOld(p.selected.list);
  p.cleared = VectorFrom<int32_t>(job.cleared);
  p.cleared_count = Int(job.cleared.cols);

  const int64_t all = std::max<int64_t>(1, queue_.device().multiprocessors / groups);
  const auto blocks_of = [](const LinearWeights& w, int64_t share) {
    const int64_t most = DivideUp(w.outputs(), kLeastOutputs);
    return std::max(std::min(share, most), DivideUp(w.outputs(), int64_t{kMostLinearOutputs}));
  };
  int64_t share = all;
  if (rides) {
    p.ride = RowsOf(*job.ride.w, job.ride.y, x);
    const auto bytes = [](const LinearWeights& w) { return w.outputs() * w.inputs() * SizeOf(w.weight.dtype); };
    const int64_t ride = bytes(*job.ride.w), both = ride + bytes(job.w);
    const int64_t ride_share = std::clamp<int64_t>((all * ride + both / 2) / both, 1, std::max<int64_t>(1, all - 1));
    p.ride_blocks = Int(blocks_of(*job.ride.w, ride_share));
    share = std::max<int64_t>(1, all - p.ride_blocks);
  }
  const int64_t blocks = blocks_of(job.w, share) + p.ride_blocks;
  queue_.Launch(kKernels[type][job.x.rows > kLinearRows / 2], {groups, blocks}, type == kF32 ? 0 : kLinearRingBytes, p);
}

// Segments of inputs order the sums, so they depend on the shape of the weight alone, not on rows or device.
void Products::Sum(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group,
                   bool skip_zeros, Tensor active) {
  struct Variant {
    Kernel kernel;
    int64_t rows;
    bool wide;
  };
  constexpr Variant kVariants[][4] = {
      {{kSumF32x1, 1, false}, {kSumF32x4, 4, false}, {kSumF32x8, 8, false}, {kSumF32x8, 8, false}},
      {{kSumF16x1, 1, false}, {kSumF16x4, 4, false}, {kSumF16x8, 8, false}, {kSumF16x16, 16, true}},
      {{kSumBF16x1, 1, false}, {kSumBF16x4, 4, false}, {kSumBF16x8, 8, false}, {kSumBF16x16, 16, true}},
      {{kSumI8x1, 1, false}, {kSumI8x4, 4, false}, {kSumI8x8, 8, true}, {kSumI8x8, 8, true}},
  };
  const auto& variants = kVariants[TypeOf(w.weight.dtype)];
  const Variant& variant = *std::find_if(std::begin(variants), std::end(variants) - 1,
                                         [&](const Variant& variant) { return x.rows <= variant.rows; });
  const int64_t slab = kSumRowBytes / SizeOf(w.weight.dtype), slabs = DivideUp(w.outputs(), slab);
  const int64_t most_segments = std::clamp<int64_t>(kSumBlocks / slabs, 1, kSumSegments);
  const int64_t segment = RoundUp(DivideUp(w.inputs(), most_segments), kSumSegmentInputs);
  const int64_t segments = DivideUp(w.inputs(), segment);
  CHECK(segment / kWarps <= kSumMostPart && w.weight.stride * SizeOf(w.weight.dtype) <= INT32_MAX)
      << w.outputs() << " outputs of " << w.inputs() << " inputs";
  const int64_t most_rows = RoundUp(std::max(kSumRows, DivideUp(x.rows, kSumLaunches)), variant.rows);
  const int64_t rows_at_once = std::min(most_rows, x.rows);
  const bool joins = x.rows > kSumOwnRows;

  SumParams p = {};
  p.weight = w.weight.data;
  p.stride = w.weight.stride;
  p.scale = VectorFrom<float>(w.scale);
  p.selected = SelectionFrom(selected, /*masks=*/false);
  p.list_early = queue_.IsOld(p.selected.list);
  p.sums = {.partial = {scratch_.Partial<float>(segments * rows_at_once * slabs * slab), slabs * slab},
            .bias = VectorFrom<float>(w.bias),
            .segments = Int(segments),
            .rows = 0};
  p.tickets = joins ? nullptr : scratch_.Tickets(slabs + 1);
  p.active = VectorFrom<int32_t>(active);
  p.counted = Int(std::max<int64_t>(0, active.cols - 1));
  p.all_rows = Int(x.rows);
  p.inputs = Int(w.inputs());
  p.outputs = Int(w.outputs());
  p.group = Int(group);
  p.segment = Int(segment);
  p.vectors = HasVectors(w.weight);
  p.skip_zeros = skip_zeros;
  for (int64_t row = 0; row < x.rows; row += rows_at_once) {
    p.sums.rows = Int(std::min(rows_at_once, x.rows - row));
    p.x = MatrixFrom<const float>(x);
    p.x.data += row * x.stride;
    p.y = MatrixFrom<float>(y);
    p.y.data += row * y.stride;
    held_.HoldSum({.kernel = variant.kernel,
                   .grid = {DivideUp(p.sums.rows, variant.rows), slabs, segments},
                   .shared_bytes = SumSharedBytes(variant.wide, Int(variant.rows), Int(slab)),
                   .params = p,
                   .y = y.Rows(row, p.sums.rows)});
    p.active = nullptr;
  }
}

}  // namespace dejavu::cuda
