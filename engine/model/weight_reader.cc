#include "engine/model/weight_reader.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "engine/model/weight_convert.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

// From the first of `runs` to the last.
Shard::Range SpanOf(const Runs& runs) {
  return {runs.front().first, runs.back().first + runs.back().count - runs.front().first};
}

// Keeps `columns` of the columns of `span` in each row and closes the gaps.
template <typename T>
void KeepColumns(T* values, int64_t rows, const Runs& columns, Shard::Range span) {
  T* to = values;
  for (int64_t r = 0; r < rows; ++r) {
    const T* const from = values + r * span.count;
    for (const Shard::Range& run : columns) {
      for (int32_t c = run.first; c < run.first + run.count; ++c) *to++ = from[c - span.first];
    }
  }
}

// Infinities and NaNs have all exponent bits set in every one of the three types.
template <typename Bits>
bool AllFinite(const Bits* values, int64_t count, Bits exponent_mask) {
  Bits any = 0;
  for (int64_t i = 0; i < count; ++i) any |= static_cast<Bits>((values[i] & exponent_mask) == exponent_mask);
  return any == 0;
}

bool AllFinite(const void* values, int64_t count, DType dtype) {
  if (dtype == DType::kFloat32) return AllFinite(static_cast<const uint32_t*>(values), count, uint32_t{0x7f800000});
  const uint16_t mask = dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
  return AllFinite(static_cast<const uint16_t*>(values), count, mask);
}

absl::Status NotFinite(const StoredTensor& tensor) {
  return absl::InvalidArgumentError(absl::StrCat(tensor.file->path(), ": tensor ", tensor.name,
                                                 " holds values that are not finite (NaN or infinity)"));
}

}  // namespace

absl::Status WeightReader::Advance(int64_t bytes) {
  done_bytes_ += bytes;
  if (progress_ && !progress_(done_bytes_, plan_.source_bytes())) return absl::CancelledError("loading was cancelled");
  return absl::OkStatus();
}

// Norms and biases: widened to float32.
absl::Status WeightReader::ReadVector(const WeightPlacement& p) {
  const int64_t count = CountOf(p.columns);
  const Tensor view = p.view->Cols(p.first_row, count);
  if (p.source == nullptr) {
    backend_.Upload(view, std::vector<float>(count, p.constant).data());
    return absl::OkStatus();
  }
  return ForStripes(p, [&](int64_t, int64_t) {
    wide_.resize(std::max<size_t>(wide_.size(), count));
    WidenValues(stripe_.data(), p.source->dtype, count, wide_.data());
    backend_.Upload(view, wide_.data());
    return Advance(count * SizeOf(p.source->dtype));
  });
}

template <typename Use>
absl::Status WeightReader::ForStripes(const WeightPlacement& p, const Use& use) {
  const StoredTensor& source = *p.source;
  const Shard::Range span = SpanOf(p.columns);
  const int64_t rows = CountOf(p.rows), columns = CountOf(p.columns), stored_columns = source.shape.back();
  const int64_t element = SizeOf(source.dtype), row_bytes = span.count * element;
  const int64_t stripe_rows = std::clamp<int64_t>(kStripeBytes / row_bytes, 1, rows);
  stripe_.resize(std::max<int64_t>(stripe_.size(), stripe_rows * row_bytes));
  const auto read = [&](int64_t row, int64_t n, char* target) -> absl::Status {
    if (span.count == stored_columns) return Checkpoint::Read(source, row * stored_columns, n * stored_columns, target);
    for (int64_t i = 0; i < n; ++i) {
      RETURN_IF_ERROR(
          Checkpoint::Read(source, (row + i) * stored_columns + span.first, span.count, target + i * row_bytes));
    }
    return absl::OkStatus();
  };
  auto run = p.rows.begin();
  int64_t done_of_run = 0;
  for (int64_t r = 0; r < rows; r += stripe_rows) {
    const int64_t n = std::min(stripe_rows, rows - r);
    for (int64_t filled = 0; filled < n;) {
      const int64_t some = std::min(n - filled, run->count - done_of_run);
      RETURN_IF_ERROR(read(run->first + done_of_run, some, &stripe_[filled * row_bytes]));
      filled += some;
      done_of_run += some;
      if (done_of_run == run->count) ++run, done_of_run = 0;
    }
    if (columns < span.count) {
      if (element == 4) KeepColumns(reinterpret_cast<uint32_t*>(stripe_.data()), n, p.columns, span);
      if (element == 2) KeepColumns(reinterpret_cast<uint16_t*>(stripe_.data()), n, p.columns, span);
    }
    if (!AllFinite(stripe_.data(), n * columns, source.dtype)) return NotFinite(source);
    RETURN_IF_ERROR(use(r, n));
  }
  return absl::OkStatus();
}

absl::Status WeightReader::ReadMatrix(const WeightPlacement& p) {
  const StoredTensor& source = *p.source;
  const int64_t cols = CountOf(p.columns);
  const DType dtype = p.view->dtype;
  if (dtype == DType::kInt8 && p.transposed) RETURN_IF_ERROR(ReadColumnScales(p));
  return ForStripes(p, [&](int64_t first, int64_t rows) -> absl::Status {
    const char* values = stripe_.data();
    if (dtype != source.dtype) {
      RETURN_IF_ERROR(Convert(p, first, rows));
      values = converted_.data();
    }
    if (p.transposed) {
      transposed_.resize(std::max<size_t>(transposed_.size(), rows * cols * SizeOf(dtype)));
      TransposeValues(values, SizeOf(dtype), rows, cols, transposed_.data());
      backend_.Upload(p.view->Cols(first, rows), transposed_.data());
    } else {
      backend_.Upload(p.view->Rows(p.first_row + first, rows), values);
    }
    return Advance(rows * cols * SizeOf(source.dtype));
  });
}

// The stripe, `rows` rows from `first` on, into converted_.
absl::Status WeightReader::Convert(const WeightPlacement& p, int64_t first, int64_t rows) {
  const int64_t cols = CountOf(p.columns), count = rows * cols;
  const DType dtype = p.view->dtype;
  wide_.resize(std::max<size_t>(wide_.size(), count));
  converted_.resize(std::max<size_t>(converted_.size(), count * SizeOf(dtype)));
  WidenValues(stripe_.data(), p.source->dtype, count, wide_.data());
  if (dtype != DType::kInt8) {
    if (NarrowValues(wide_.data(), count, dtype, converted_.data())) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(p.source->file->path(), ": tensor ", p.source->name, " holds ",
                                                   LargestMagnitude(wide_.data(), count), ", which is beyond ",
                                                   Name(dtype)));
  }
  auto* const integers = reinterpret_cast<int8_t*>(converted_.data());
  if (p.transposed) {
    for (int64_t r = 0; r < rows; ++r) {
      QuantiseColumns(&wide_[r * cols], cols, inverses_.data(), integers + r * cols);
    }
    return absl::OkStatus();
  }
  scales_.resize(rows);
  for (int64_t r = 0; r < rows; ++r) {
    scales_[r] = Int8Scale(LargestMagnitude(&wide_[r * cols], cols));
    QuantiseRow(&wide_[r * cols], cols, Int8Inverse(scales_[r]), integers + r * cols);
  }
  backend_.Upload(p.scale->Cols(p.first_row + first, rows), scales_.data());
  return absl::OkStatus();
}

// The factors of a matrix that is stored transposed, from its columns; leaves what Convert needs in inverses_.
absl::Status WeightReader::ReadColumnScales(const WeightPlacement& p) {
  const int64_t cols = CountOf(p.columns);
  scales_.assign(cols, 0.0f);
  RETURN_IF_ERROR(ForStripes(p, [&](int64_t, int64_t rows) {
    wide_.resize(std::max<size_t>(wide_.size(), rows * cols));
    WidenValues(stripe_.data(), p.source->dtype, rows * cols, wide_.data());
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) scales_[c] = std::max(scales_[c], std::fabs(wide_[r * cols + c]));
    }
    return Advance(0);
  }));
  inverses_.resize(cols);
  std::transform(scales_.begin(), scales_.end(), scales_.begin(), Int8Scale);
  std::transform(scales_.begin(), scales_.end(), inverses_.begin(), Int8Inverse);
  backend_.Upload(*p.scale, scales_.data());
  return absl::OkStatus();
}

absl::Status WeightReader::Read() {
  for (const WeightPlacement& p : plan_.placements()) {
    const bool matrix = p.source != nullptr && p.source->shape.size() == 2;
    RETURN_IF_ERROR(matrix ? ReadMatrix(p) : ReadVector(p));
  }
  backend_.Synchronize();
  return absl::OkStatus();
}

}  // namespace dejavu
