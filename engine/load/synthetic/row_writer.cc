#include "engine/load/synthetic/row_writer.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "engine/load/synthetic/in_parallel.h"
#include "engine/model/weight_convert.h"
#include "kernels/base/check.h"

namespace dejavu {

// The next stripe is made while this one is uploaded: the first touch of new memory costs as much as making it.
absl::Status RowWriter::Write(const Tensor& weight, const Tensor& scale, const RowId& id, const MakeRow& make) {
  if (weight.empty()) return absl::OkStatus();
  const int64_t row_bytes = weight.cols * SizeOf(weight.dtype);
  const int64_t stripe_rows = std::clamp<int64_t>(kStripeBytes / row_bytes, 1, weight.rows);
  const auto make_stripe = [&](int64_t start, Stripe* stripe) {
    const int64_t n = std::min(stripe_rows, weight.rows - start);
    stripe->values.resize(std::max<size_t>(stripe->values.size(), n * row_bytes));
    stripe->scales.resize(std::max<size_t>(stripe->scales.size(), n));
    InParallel(n, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) make(id(start + i), &stripe->values[i * row_bytes], &stripe->scales[i]);
    });
  };
  make_stripe(0, &stripes_[0]);
  for (int64_t r = 0; r < weight.rows; r += stripe_rows) {
    std::swap(stripes_[0], stripes_[1]);
    std::jthread next;
    if (r + stripe_rows < weight.rows) next = std::jthread([&, r] { make_stripe(r + stripe_rows, &stripes_[0]); });
    const int64_t n = std::min(stripe_rows, weight.rows - r);
    backend_.Upload(weight.Rows(r, n), stripes_[1].values.data());
    if (!scale.empty()) backend_.Upload(scale.Cols(r, n), stripes_[1].scales.data());
    if (next.joinable()) next.join();
    done_bytes_ += n * row_bytes;
    if (progress_ && !progress_(done_bytes_, total_bytes_)) return absl::CancelledError("loading was cancelled");
  }
  return absl::OkStatus();
}

absl::Status RowWriter::WriteNoise(const Tensor& weight, const Tensor& scale, const RowId& id, uint64_t key,
                                   double deviation) {
  const auto count = static_cast<int64_t>(pool_.values().size());
  const int64_t element = SizeOf(weight.dtype);
  packed_.resize(count * sizeof(float));
  std::vector<float> scaled(pool_.values());
  for (float& value : scaled) value *= static_cast<float>(deviation);
  const float factor = Int8Scale(pool_.largest() * static_cast<float>(deviation));
  if (weight.dtype == DType::kInt8) {
    QuantiseRow(scaled.data(), count, Int8Inverse(factor), reinterpret_cast<int8_t*>(packed_.data()));
  } else {
    CHECK(NarrowValues(scaled.data(), count, weight.dtype, packed_.data())) << deviation;
  }
  return Write(weight, scale, id, [&](int64_t row, char* values, float* row_scale) {
    std::memcpy(values, &packed_[NoisePool::Offset(key, row) * element], weight.cols * element);
    *row_scale = factor;
  });
}

}  // namespace dejavu
