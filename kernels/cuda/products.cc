#include "kernels/cuda/products.h"

#include <algorithm>

#include "kernels/base/check.h"
#include "kernels/base/round.h"
#include "kernels/cuda/kernel_params.h"

namespace dejavu::cuda {
namespace {

constexpr int64_t kSumRows = 64;                  // at once of a Sum, whose scratch grows with the rows
constexpr int64_t kSumSegments = 16;              // at most, so many blocks share the inputs
constexpr int64_t kLinearStaticBytes = 21 << 10;  // shared memory that Linear takes beside x; and 1 KB is the device's
constexpr int64_t kBlocksPerMultiprocessor = 2;
constexpr int64_t kGemmRows = 33;  // from so many rows on a product is the library's

}  // namespace

bool Products::TakesGemm(const Tensor& x, const LinearWeights& w, const Selection& selected) {
  const DType dtype = w.weight.dtype;
  return x.rows >= kGemmRows && selected.all() && (dtype == DType::kFloat16 || dtype == DType::kBFloat16);
}

// In two products, of the upper and the lower halves of x, so that x keeps its precision.
void Products::Gemm(Tensor y, Tensor x, const LinearWeights& w, bool relu, Tensor cleared) {
  const bool bfloat16 = w.weight.dtype == DType::kBFloat16;
  const int64_t stride = RoundUp(x.cols, kVectorBytes / SizeOf(w.weight.dtype));
  uint16_t* const halves = scratch_.Halves(2 * x.rows * stride);
  const SplitParams split = {.x = MatrixFrom<const float>(x),
                             .high = {halves, stride},
                             .low = {halves + x.rows * stride, stride},
                             .features = Int(x.cols),
                             .cleared = VectorFrom<int32_t>(cleared),
                             .cleared_count = Int(cleared.cols)};
  queue_.Launch(bfloat16 ? kSplitBF16 : kSplitF16, RowGrid(x), 0, split);
  for (const bool low : {false, true}) {
    const DejavuCudaGemm gemm = {.a = low ? split.low.data : split.high.data,
                                 .b = w.weight.data,
                                 .c = VectorFrom<float>(y),
                                 .m = x.rows,
                                 .n = w.outputs(),
                                 .k = w.inputs(),
                                 .a_stride = stride,
                                 .b_stride = w.weight.stride,
                                 .c_stride = y.stride,
                                 .bfloat16 = bfloat16,
                                 .b_is_kn = w.layout == LinearWeights::Layout::kInputRows,
                                 .accumulate = low};
    queue_.Try(queue_.module().gemm(queue_.context(), &gemm), "product of many rows");
  }
  if (w.bias.empty() && !relu) return;
  const FinishGemmParams finish = {
      .y = MatrixFrom<float>(y), .bias = VectorFrom<float>(w.bias), .features = Int(y.cols), .relu = relu};
  queue_.Launch(kFinishGemm, RowGrid(y), 0, finish);
}

// A block takes as much of x as lets two of them share a multiprocessor.
OutputRows Products::RowsOf(const LinearWeights& w, const Tensor& y, int64_t rows) const {
  CHECK(w.outputs() * w.inputs() > 0 && w.outputs() * w.weight.stride <= UINT32_MAX)
      << w.outputs() << " outputs of " << w.inputs() << " inputs";
  const int64_t window = 4 * kVectorBytes / SizeOf(w.weight.dtype);
  const int64_t range = DivideUp(DivideUp(w.inputs(), window), kWarps);
  const int64_t room =
      std::min<int64_t>(queue_.device().shared_bytes_per_block,
                        queue_.device().shared_bytes_per_multiprocessor / kBlocksPerMultiprocessor - 1024) -
      kLinearStaticBytes;
  const int64_t fit = room / (kWarps * rows * kLinearXBytes);
  return {.weight = w.weight.data,
          .stride = w.weight.stride,
          .bias = VectorFrom<float>(w.bias),
          .scale = VectorFrom<float>(w.scale),
          .y = MatrixFrom<float>(y),
          .outputs = Int(w.outputs()),
          .vectors = HasVectors(w.weight),
          .chunk = Int(std::clamp<int64_t>(fit, 1, range))};
}

void Products::Multiply(const Job& job) {
  constexpr Kernel kKernels[] = {kLinearF32, kLinearF16, kLinearBF16, kLinearI8};
  constexpr Kernel kChunkedKernels[] = {kLinearF32, kLinearF16Chunked, kLinearBF16Chunked, kLinearI8Chunked};
  constexpr int64_t kMostInt8Inputs = 128 << 10;  // whose products with halves of integers add up in int32
  const DType dtype = job.w.weight.dtype;
  const bool int8 = dtype == DType::kInt8, rides = job.ride.w != nullptr;
  CHECK((!int8 && !rides) || job.x.cols <= kMostInt8Inputs) << job.x.cols << " inputs of int8 weights";
  const int64_t rows = std::min<int64_t>(job.x.rows, kLinearRows);
  const int64_t groups = DivideUp(job.x.rows, kLinearRows);
  if (groups == 0) return;

  LinearParams p = {};
  p.x = MatrixFrom<const float>(job.x);
  p.rows = Int(job.x.rows);
  p.inputs = Int(job.x.cols);
  p.x_vectors = HasVectors(job.x);
  p.relu = job.relu;
  p.group = Int(job.group);
  p.w = RowsOf(job.w, job.y, rows);
  p.selected = job.selected;
  p.cleared = VectorFrom<int32_t>(job.cleared);
  p.cleared_count = Int(job.cleared.cols);

  const int64_t window = 4 * kVectorBytes / SizeOf(dtype);
  const bool chunked = dtype != DType::kFloat32 && p.w.chunk * kWarps * window < p.inputs;
  const int64_t tiles = !chunked ? 1 : int8 ? kChunkedInt8Tiles : kChunkedTiles;
  const int64_t passes = DivideUp(job.w.outputs(), kLinearOutputs * tiles);
  const int64_t most_blocks = std::max<int64_t>(1, kBlocksPerMultiprocessor * queue_.device().multiprocessors / groups);
  const int64_t passes_of_block = DivideUp(passes, most_blocks);  // alike, so that blocks end together
  int64_t blocks = DivideUp(passes, passes_of_block), chunk = p.w.chunk;
  if (rides) {
    const int64_t ride_tiles = chunked ? kChunkedInt8Tiles : 1;
    p.ride = RowsOf(*job.ride.w, job.ride.y, rows);
    p.ride_blocks = Int(DivideUp(DivideUp(p.ride.outputs, kLinearOutputs * ride_tiles), passes_of_block));
    blocks += p.ride_blocks;
    chunk = std::max<int64_t>(chunk, p.ride.chunk);
  }
  const WeightType type = TypeOf(dtype);
  queue_.Launch(chunked ? kChunkedKernels[type] : kKernels[type], {groups, blocks},
                chunk * kWarps * rows * kLinearXBytes, p);
}

// Segments of inputs depend on their number alone: they order the sums.
void Products::Sum(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group,
                   bool skip_zeros, Tensor active) {
  struct Variant {
    Kernel kernel;
    int64_t rows;
  };
  constexpr Variant kVariants[][3] = {
      {{kSumF32x1, 1}, {kSumF32x4, 4}, {kSumF32x8, 8}},
      {{kSumF16x1, 1}, {kSumF16x4, 4}, {kSumF16x8, 8}},
      {{kSumBF16x1, 1}, {kSumBF16x4, 4}, {kSumBF16x8, 8}},
      {{kSumI8x1, 1}, {kSumI8x4, 4}, {kSumI8x4, 4}},
  };
  const auto& variants = kVariants[TypeOf(w.weight.dtype)];
  const Variant& variant = variants[x.rows == 1 ? 0 : x.rows <= variants[1].rows ? 1 : 2];
  const int64_t slab = 32 * kVectorBytes / SizeOf(w.weight.dtype), slabs = DivideUp(w.outputs(), slab);
  const int64_t segment = RoundUp(DivideUp(w.inputs(), kSumSegments), kSumSegment);
  const int64_t segments = DivideUp(w.inputs(), segment);
  const int64_t groups_at_once = kSumRows / variant.rows;
  CHECK(segment <= UINT16_MAX) << w.inputs() << " inputs";
  const int64_t shared =
      std::max(segment * variant.rows, kWarps * variant.rows * slab) * int64_t{sizeof(float)} + 3 * segment;

  SumParams p = {};
  p.x = MatrixFrom<const float>(x);
  p.y = MatrixFrom<float>(y);
  p.weight = w.weight.data;
  p.stride = w.weight.stride;
  p.bias = VectorFrom<float>(w.bias);
  p.scale = VectorFrom<float>(w.scale);
  p.selected = SelectionFrom(selected, selected.masks.rows >= x.rows);
  p.active = VectorFrom<int32_t>(active);
  p.counted = Int(std::max<int64_t>(0, active.cols - 1));
  p.rows = Int(x.rows);
  p.inputs = Int(w.inputs());
  p.outputs = Int(w.outputs());
  p.group = Int(group);
  p.segment = Int(segment);
  p.vectors = HasVectors(w.weight);
  p.skip_zeros = skip_zeros;
  for (int64_t row = 0; row < x.rows; row += groups_at_once * variant.rows) {
    const int64_t groups = std::min(groups_at_once, DivideUp(x.rows - row, variant.rows));
    p.first_row = Int(row);
    p.tickets = scratch_.Tickets(groups * slabs);
    p.partial = scratch_.Partial<float>(groups * segments * variant.rows * slabs * slab);
    queue_.Launch(variant.kernel, {groups, slabs, segments}, shared, p);
    p.active = nullptr;
  }
}

}  // namespace dejavu::cuda
