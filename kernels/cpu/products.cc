#include "kernels/cpu/products.h"

#include <algorithm>
#include <cstddef>
#include <memory>

#include "kernels/base/round.h"
#include "kernels/cpu/selected.h"

namespace dejavu::cpu {
namespace {

constexpr int64_t kSelectColumns = 512;  // at least, or the rows are read in pieces too short
constexpr int64_t kLineFloats = 16;      // of a cache line

// So many floats of the vector, which grows where it has less, from the start of a cache line on.
float* Aligned(std::vector<float>* memory, int64_t floats) {
  memory->resize(std::max<size_t>(memory->size(), floats + kLineFloats));
  void* start = memory->data();
  size_t space = memory->size() * sizeof(float);
  return static_cast<float*>(std::align(kLineFloats * sizeof(float), floats * sizeof(float), start, space));
}

}  // namespace

// The rows of the weight that the selected groups name; nullptr for all of them.
const int32_t* Products::Members(const Selection& selected, int64_t rows, int64_t group, int64_t* count) {
  const int64_t groups = CountOf(selected, rows / group);
  const int32_t* list = ListOf(selected);
  *count = groups * group;
  if (list == nullptr || group == 1) return list;
  if (static_cast<int64_t>(members_.size()) < rows) members_.resize(rows);
  for (int64_t i = 0; i < *count; ++i) members_[i] = static_cast<int32_t>(list[i / group] * group + i % group);
  return members_.data();
}

void Products::Linear(Tensor y, Tensor x, const LinearWeights& w, const Selection& selected, int64_t group,
                      const Ride& ride) {
  int64_t count;
  const int32_t* list = Members(selected, w.weight.rows, group, &count);
  if (w.layout == LinearWeights::Layout::kInputRows) {
    SumRows(y, x, w, list, count);
    return;
  }
  const DotJob job = Prepare(y, x, w, list, false);
  DotJob riding = job;
  int64_t total = count;
  if (ride.w != nullptr) {
    if (ride.w->weight.dtype != w.weight.dtype) riding = Prepare(ride.y, x, *ride.w, nullptr, false, &riding_in_steps_);
    riding.y = ride.y;
    riding.w = ride.w;
    riding.outputs = nullptr;
    total += ride.w->outputs();
  }
  parts_.For(total, parts_.OutputGrain(total, w.inputs() * x.rows), [&](int64_t first, int64_t last, int thread) {
    if (first < count) DotProducts(job, first, std::min(last, count), parts_.Scratch(thread));
    if (last > count) DotProducts(riding, std::max(first, count) - count, last - count, parts_.Scratch(thread));
  });
}

// The job, with x as its kernel wants it.
DotJob Products::Prepare(Tensor y, Tensor x, const LinearWeights& w, const int32_t* outputs, bool relu,
                         std::vector<float>* in_steps) {
  DotJob job = {.y = y, .x = x, .w = &w, .outputs = outputs, .relu = relu, .quantized = {}};
  if (w.weight.dtype == DType::kInt8) {
    job.quantized = QuantizeRows(x, nullptr, nullptr, x.cols);
  } else if (const int64_t step = DotStepInputs(w.weight.dtype); step > 1) {
    job.x.stride =
        RoundUp(x.cols, step) + kLineFloats;  // a power of two apart, rows would share the sets of the caches
    job.x.data = Aligned(in_steps, x.rows * job.x.stride);
    parts_.ForRows(x.rows, x.cols, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) PutInSteps(x.row<float>(r), x.cols, job.x.row<float>(r));
    });
  }
  return job;
}

// x as int8 weights want it.
Quantized Products::QuantizeRows(Tensor x, const float* factor, const int32_t* list, int64_t count) {
  const int64_t stride = RoundUp(count, kQuantizedPadding) + kQuantizedPadding;
  quantized_.resize(std::max<size_t>(quantized_.size(), x.rows * stride));
  quantized_scale_.resize(std::max<size_t>(quantized_scale_.size(), x.rows));
  parts_.ForRows(x.rows, count, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      Quantize(x.row<float>(r), factor, list, count, &quantized_[r * stride], &quantized_scale_[r]);
    }
  });
  return {quantized_.data(), stride, quantized_scale_.data()};
}

// Whether threads share the columns: where the segments' sums cost more to keep than whole rows of weights save. That
// is so for several rows of x, as long as each thread gets a good piece of a row of weights, and for short lists.
bool Products::ByColumns(int64_t rows, int64_t columns, int64_t count, int64_t inputs) const {
  constexpr int64_t kLeastRows = 4, kLeastColumns = 512, kShortShare = 10;
  if (rows > kSegmentRows) return true;
  return (rows >= kLeastRows || count * kShortShare < inputs) && columns >= kLeastColumns * parts_.threads();
}

void Products::SumRows(Tensor y, Tensor x, const LinearWeights& w, const int32_t* list, int64_t count) {
  const int64_t inputs = w.inputs(), columns = w.outputs(), segment = SegmentInputs(inputs);
  const int64_t segments = std::max<int64_t>(1, DivideUp(inputs, segment));
  bounds_.resize(std::max<size_t>(bounds_.size(), segments + 1));
  for (int64_t s = 0; s < segments; ++s) {
    bounds_[s] =
        list != nullptr ? std::lower_bound(list, list + count, s * segment) - list : std::min(s * segment, count);
  }
  bounds_[segments] = count;
  SumJob job = {.y = y,
                .x = x,
                .w = &w,
                .inputs = list,
                .count = count,
                .segments = segments,
                .bounds = bounds_.data(),
                .sums = nullptr,
                .sums_stride = 0,
                .quantized = {}};
  if (w.weight.dtype == DType::kInt8) job.quantized = QuantizeRows(x, w.scale.row<float>(0), list, count);
  const bool small = columns * count * x.rows < kSmallWork;
  if (small || ByColumns(x.rows, columns, count, inputs)) {
    const int64_t grain = small ? columns : RoundUp(DivideUp(columns, parts_.threads()), kColumnGrain);
    parts_.For(columns, grain,
               [&](int64_t first, int64_t last, int thread) { SumColumns(job, first, last, parts_.Scratch(thread)); });
    return;
  }
  // Rows of `sums` lie a line more than a power of two apart, or they would share the sets of the caches.
  job.sums_stride = RoundUp(columns, kColumnGrain) + 16;
  sums_.resize(std::max<size_t>(sums_.size(), segments * x.rows * job.sums_stride));
  job.sums = sums_.data();
  const int64_t slabs = std::clamp<int64_t>(DivideUp(2 * parts_.threads(), segments), 1, DivideUp(columns, 512));
  const int64_t slab = RoundUp(DivideUp(columns, slabs), kColumnGrain);
  parts_.For(segments * slabs, 1, [&](int64_t first, int64_t last, int thread) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t s = i / slabs, c = i % slabs * slab;
      if (bounds_[s] < bounds_[s + 1] && c < columns) {
        SumSegment(job, s, c, std::min(c + slab, columns), parts_.Scratch(thread));
      }
    }
  });
  parts_.For(columns, RoundUp(DivideUp(columns, parts_.threads()), kColumnGrain),
             [&](int64_t first, int64_t last, int thread) { JoinSegments(job, first, last, parts_.Scratch(thread)); });
}

// Outputs of w for x, in parts that whichever thread is free takes; and right after each part function(first, last).
void Products::Dots(const DotJob& job, int64_t count, int64_t grain,
                    absl::FunctionRef<void(int64_t first, int64_t last)> function) {
  parts_.For(count, grain, [&](int64_t first, int64_t last, int thread) {
    DotProducts(job, first, last, parts_.Scratch(thread));
    function(first, last);
  });
}

// The masks of a few rows. The second stage is a sum of rows: a coordinate is an input, an output a column.
void Products::SelectRows(Tensor masks, Tensor a, const SelectorWeights& w, const int32_t* points, int64_t most_rank) {
  const int64_t rows = a.rows, padded = w.b.cols, stride = RoundUp(most_rank, kQuantizedPadding) + kQuantizedPadding;
  quantized_.resize(std::max<size_t>(quantized_.size(), rows * stride));
  quantized_scale_.resize(std::max<size_t>(quantized_scale_.size(), rows));
  for (int64_t r = 0; r < rows; ++r) {
    // Beyond the rank of its operating point a row has zeros.
    const int64_t rank = points[r] == kSelectEverything ? 0 : w.ranks.row<int32_t>(0)[points[r]];
    std::fill_n(&quantized_[r * stride], stride, int16_t{0});
    Quantize(a.row<float>(r), nullptr, nullptr, rank, &quantized_[r * stride], &quantized_scale_[r]);
  }
  const int64_t segments = std::max<int64_t>(1, DivideUp(most_rank, kQuantizedBlock));
  bounds_.resize(std::max<size_t>(bounds_.size(), segments + 1));
  for (int64_t s = 0; s <= segments; ++s) bounds_[s] = std::min(s * kQuantizedBlock, most_rank);
  const int64_t sums_stride = padded + 16;
  sums_.resize(std::max<size_t>(sums_.size(), segments * rows * sums_stride));
  select_sums_.resize(std::max<size_t>(select_sums_.size(), rows * padded));

  LinearWeights stage;
  stage.layout = LinearWeights::Layout::kInputRows;
  stage.weight = w.b;
  const SumJob sums = {.y = {select_sums_.data(), DType::kFloat32, rows, padded, padded},
                       .x = a.Cols(0, most_rank),
                       .w = &stage,
                       .inputs = nullptr,
                       .count = most_rank,
                       .segments = segments,
                       .bounds = bounds_.data(),
                       .sums = sums_.data(),
                       .sums_stride = sums_stride,
                       .quantized = {quantized_.data(), stride, quantized_scale_.data()}};
  const SelectJob job = {.sums = sums, .w = w, .points = points, .masks = masks};
  const bool small = rows * most_rank * padded < kSmallWork;
  const int64_t grain =
      small ? padded
            : std::max<int64_t>(kSelectColumns, RoundUp(DivideUp(padded, 4 * parts_.threads()), kSelectorPadding));
  parts_.For(padded, grain,
             [&](int64_t first, int64_t last, int thread) { SelectColumns(job, first, last, parts_.Scratch(thread)); });
}

}  // namespace dejavu::cpu
