#include "kernels/cuda/fragment_store.h"

#include <cstdint>
#include <optional>

#include "kernels/base/check.h"
#include "kernels/base/round.h"
#include "kernels/cuda/kernel_params.h"

namespace dejavu::cuda {
namespace {

constexpr int64_t kWindowBytes = 64;            // of a weight row
constexpr int64_t kFragmentBytes = 128;         // of a row of x in a window: two parts of four lanes
constexpr int64_t kMostInt8Inputs = 128 << 10;  // whose products with halves of integers add up in int32

}  // namespace

FragmentStore::Forms FragmentStore::FormsOf(DType weights) {
  const WeightType type = TypeOf(weights);
  return {.halves = type == kI8 ? kF32 : type, .integers = type == kI8};
}

// Of x_. What rows of a step leave there lies at the same place in every step of that shape.
RowFragments FragmentStore::Placed(Forms forms) {
  RowFragments placed = {};
  const auto bytes = [&](int64_t weight_bytes) {
    return x_.rows * kFragmentBytes * DivideUp(x_.cols * weight_bytes, kWindowBytes);
  };
  if (forms.halves != kF32) {
    placed.halves.pieces = scratch_.HalfFragments(bytes(2));
    placed.halves_type = forms.halves;
  }
  if (forms.integers) {
    CHECK(x_.cols <= kMostInt8Inputs) << x_.cols << " inputs of int8 weights";
    const int64_t scales = RoundUp(x_.rows * int64_t{sizeof(float)}, kVectorBytes);
    char* const memory = scratch_.IntegerFragments(scales + bytes(1));
    placed.integers = {.pieces = memory + scales, .scales = reinterpret_cast<float*>(memory)};
  }
  return placed;
}

RowFragments FragmentStore::MadeWith(const Tensor& x, Forms forms) {
  x_ = x;
  forms_ = forms;
  return Placed(forms);
}

RowFragments FragmentStore::Of(const Tensor& x, Forms forms) {
  if (std::optional<HeldNorm> norm = held_.TakeNormOf(x)) {
    norm->params.fragments = MadeWith(x, forms);
    held_.Launch(*norm);
    return norm->params.fragments;
  }
  Forms missing = forms;
  if (SameView(x, x_)) {
    if (missing.halves == forms_.halves) missing.halves = kF32;
    missing.integers = missing.integers && !forms_.integers;
  } else {
    x_ = x;
    forms_ = {};
  }
  if (missing.halves != kF32 || missing.integers) {
    HeldNorm split = {.params = {}, .y = {}, .x = x, .sum = {}};
    split.params.x = MatrixFrom<float>(x);
    split.params.fragments = Placed(missing);
    split.params.rows = Int(x.rows);
    split.params.features = Int(x.cols);
    split.params.vectors = HasVectors(x);
    held_.Launch(split);
    if (missing.halves != kF32) forms_.halves = missing.halves;
    forms_.integers = forms_.integers || missing.integers;
  }
  return Placed(forms);
}

void FragmentStore::Wrote(const Tensor& y) {
  if (!x_.empty() && !y.empty() && Overlap(x_, y)) Forget();
}

}  // namespace dejavu::cuda
