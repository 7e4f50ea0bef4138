// RowWriter: makes the rows of generated matrices and uploads them, stripe by stripe. One thread calls; making a stripe
// uses threads of its own.
#ifndef ENGINE_LOAD_SYNTHETIC_ROW_WRITER_H_
#define ENGINE_LOAD_SYNTHETIC_ROW_WRITER_H_

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "engine/load/synthetic/noise.h"
#include "engine/model/opt_weights.h"
#include "kernels/backend.h"

namespace dejavu {

class RowWriter {
 public:
  // Makes a row of `cols` values as they are stored, and its factor where it is int8. `row` is its number in the whole
  // model, on which alone it depends.
  using MakeRow = std::function<void(int64_t row, char* values, float* scale)>;
  // The number in the whole model of an own row.
  using RowId = std::function<int64_t(int64_t own_row)>;

  // `total_bytes`: of all matrices that will be written, for `progress`.
  RowWriter(const NoisePool& pool, Backend& backend, const LoadProgress& progress, int64_t total_bytes)
      : pool_(pool), backend_(backend), progress_(progress), total_bytes_(total_bytes) {}

  // Both fill `weight`, and `scale` where there is one. CANCELLED where the progress says so.
  absl::Status Write(const Tensor& weight, const Tensor& scale, const RowId& id, const MakeRow& make);
  // With rows of the pool times `deviation`.
  absl::Status WriteNoise(const Tensor& weight, const Tensor& scale, const RowId& id, uint64_t key, double deviation);

 private:
  struct Stripe {
    std::vector<char> values;   // [rows, cols] as stored
    std::vector<float> scales;  // [rows], for int8
  };

  const NoisePool& pool_;
  Backend& backend_;
  const LoadProgress& progress_;
  const int64_t total_bytes_;
  int64_t done_bytes_ = 0;
  std::array<Stripe, 2> stripes_;
  std::vector<char> packed_;  // the pool, scaled and rounded
};

}  // namespace dejavu

#endif  // ENGINE_LOAD_SYNTHETIC_ROW_WRITER_H_
