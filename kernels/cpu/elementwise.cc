#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/kernels.h"
#include "kernels/draw.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/elementwise.cc"
#include "hwy/foreach_target.h"

// What follows is included once for each target, so it stays below foreach_target.h.
#include "kernels/cpu/tiles-inl.h"

HWY_BEFORE_NAMESPACE();
namespace dejavu::cpu::HWY_NAMESPACE {

template <typename W>
void EmbedRow(float* y, const W* row, float scale, int64_t n, bool accumulate) {
  const V factor = hn::Set(F32(), scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const V v = hn::Mul(Widen(row + i), factor);
    hn::StoreU(accumulate ? hn::Add(hn::LoadU(F32(), y + i), v) : v, F32(), y + i);
  }
  if (i == n) return;
  const V v = hn::Mul(WidenPart(row + i, n - i), factor);
  StorePart(accumulate ? hn::Add(WidenPart(y + i, n - i), v) : v, y + i, n - i);
}

void Embed(const Tensor& y, const Tensor& ids, const Tensor& drawn, const EmbeddingWeights& embedding, int64_t offset,
           bool accumulate, int64_t first, int64_t last) {
  const Tensor& table = embedding.weight;
  for (int64_t r = first; r < last; ++r) {
    int64_t id = ids.row<int32_t>(0)[r];
    if (id < 0 && !drawn.empty()) {
      const int32_t place = DrawnId(static_cast<int32_t>(id));
      CHECK(place < drawn.cols) << "place " << place << " of " << drawn.cols;
      id = drawn.row<int32_t>(0)[place];
    }
    id += offset;
    float* to = y.row<float>(r);
    if (id < 0 || id >= table.rows) {
      if (!accumulate) std::fill_n(to, y.cols, 0.0f);
      continue;
    }
    const float scale = embedding.scale.empty() ? 1.0f : embedding.scale.row<float>(0)[id];
    switch (table.dtype) {
      case DType::kFloat32:
        EmbedRow(to, table.row<float>(id), scale, y.cols, accumulate);
        break;
      case DType::kFloat16:
        EmbedRow(to, table.row<hwy::float16_t>(id), scale, y.cols, accumulate);
        break;
      case DType::kBFloat16:
        EmbedRow(to, table.row<hwy::bfloat16_t>(id), scale, y.cols, accumulate);
        break;
      case DType::kInt8:
        EmbedRow(to, table.row<int8_t>(id), scale, y.cols, accumulate);
        break;
      default:
        CHECK(false) << "table of type " << Name(table.dtype);
    }
  }
}

// Mean and variance in two passes, as PyTorch does.
void LayerNormRow(float* y, const float* x, const float* weight, const float* bias, float epsilon, int64_t n) {
  const int64_t whole = n - n % kLanes;
  V sum = hn::Zero(F32());
  for (int64_t i = 0; i < whole; i += kLanes) sum = hn::Add(sum, hn::LoadU(F32(), x + i));
  if (whole < n) sum = hn::Add(sum, WidenPart(x + whole, n - whole));
  const V mean = hn::Set(F32(), hn::GetLane(hn::SumOfLanes(F32(), sum)) / n);

  V squares = hn::Zero(F32());
  for (int64_t i = 0; i < whole; i += kLanes) {
    const V from_mean = hn::Sub(hn::LoadU(F32(), x + i), mean);
    squares = hn::MulAdd(from_mean, from_mean, squares);
  }
  if (whole < n) {
    const V from_mean = hn::Sub(WidenPart(x + whole, n - whole), mean);
    const V valid = hn::IfThenElseZero(hn::FirstN(F32(), n - whole), from_mean);
    squares = hn::MulAdd(valid, valid, squares);
  }
  const float variance = hn::GetLane(hn::SumOfLanes(F32(), squares)) / n;
  const V scale = hn::Set(F32(), 1.0f / std::sqrt(variance + epsilon));

  for (int64_t i = 0; i < whole; i += kLanes) {
    const V normal = hn::Mul(hn::Sub(hn::LoadU(F32(), x + i), mean), scale);
    hn::StoreU(hn::MulAdd(normal, hn::LoadU(F32(), weight + i), hn::LoadU(F32(), bias + i)), F32(), y + i);
  }
  if (whole < n) {
    const int64_t rest = n - whole;
    const V normal = hn::Mul(hn::Sub(WidenPart(x + whole, rest), mean), scale);
    StorePart(hn::MulAdd(normal, WidenPart(weight + whole, rest), WidenPart(bias + whole, rest)), y + whole, rest);
  }
}

void LayerNorm(const Tensor& y, const Tensor& x, const NormWeights& norm, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    LayerNormRow(y.row<float>(r), x.row<float>(r), norm.weight.row<float>(0), norm.bias.row<float>(0), norm.epsilon,
                 x.cols);
  }
}

// An infinity or a NaN makes the whole row NaN.
void Quantize(const float* x, const float* factor, const int32_t* list, int64_t count, int16_t* q, float* scale) {
  constexpr int32_t kInfinity = 0x7f800000;
  const auto at = [&](int64_t i) HWY_ATTR {
    const int64_t place = list != nullptr ? list[i] : i;
    return factor != nullptr ? x[place] * factor[place] : x[place];
  };
  const bool plain = list == nullptr && factor == nullptr;
  const int64_t whole = plain ? count - count % kLanes : 0;
  int32_t most = 0;  // of floats without sign, which order as integers
  hn::Vec<hn::RebindToSigned<F32>> most_of_lane = hn::Zero(hn::RebindToSigned<F32>());
  for (int64_t i = 0; i < whole; i += kLanes) {
    const V magnitude = hn::Abs(hn::LoadU(F32(), x + i));
    most_of_lane = hn::Max(most_of_lane, hn::BitCast(hn::RebindToSigned<F32>(), magnitude));
  }
  if (whole > 0) most = hn::GetLane(hn::MaxOfLanes(hn::RebindToSigned<F32>(), most_of_lane));
  for (int64_t i = whole; i < count; ++i) {
    const float v = std::abs(at(i));
    int32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    most = std::max(most, bits);
  }
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  std::fill_n(q + count, kQuantizedPadding, int16_t{0});
  if (most >= kInfinity || largest < 0x1p-100f) {
    *scale = most >= kInfinity ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
    std::fill_n(q, count, int16_t{0});
    return;
  }
  int exponent;
  std::frexp(largest, &exponent);
  *scale = std::ldexp(1.0f, exponent - kQuantizedBits);
  const float inverse = 1.0f / *scale;
  const hn::Rebind<int16_t, F32> di16;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const V scaled = hn::Mul(hn::LoadU(F32(), x + i), hn::Set(F32(), inverse));
    const hn::RebindToSigned<F32> di32;
    const auto integers = hn::Min(hn::NearestInt(scaled), hn::Set(di32, kQuantizedMost));
    hn::StoreU(hn::DemoteTo(di16, hn::Max(integers, hn::Set(di32, -kQuantizedMost))), di16, q + i);
  }
  for (int64_t i = whole; i < count; ++i) {
    q[i] = static_cast<int16_t>(std::clamp<long>(std::lrintf(at(i) * inverse), -kQuantizedMost, kQuantizedMost));
  }
}

void Add(const Tensor& x, const Tensor& y, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) EmbedRow(x.row<float>(r), y.row<float>(r), 1.0f, x.cols, true);
}

}  // namespace dejavu::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace dejavu::cpu {

HWY_EXPORT(Embed);
HWY_EXPORT(LayerNorm);
HWY_EXPORT(Quantize);
HWY_EXPORT(Add);

void Embed(const Tensor& y, const Tensor& ids, const Tensor& drawn, const EmbeddingWeights& table, int64_t offset,
           bool accumulate, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(Embed)(y, ids, drawn, table, offset, accumulate, first, last);
}

void LayerNorm(const Tensor& y, const Tensor& x, const NormWeights& norm, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(LayerNorm)(y, x, norm, first, last);
}

void Quantize(const float* x, const float* factor, const int32_t* list, int64_t count, int16_t* q, float* scale) {
  HWY_DYNAMIC_DISPATCH(Quantize)(x, factor, list, count, q, scale);
}

void Add(const Tensor& x, const Tensor& y, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(Add)(x, y, first, last);
}

}  // namespace dejavu::cpu
#endif
