// The cost model fed with any steps and any times: what it predicts stays a time, and after enough steps of one kind it
// is theirs again.
#include <algorithm>
#include <cmath>
#include <string>

#include "engine/scheduling/cost_model.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

constexpr double kMostMs = 1e9;  // eleven days

void CheckFinite(const CostModel& costs) {
  const CostParameters p = costs.parameters();
  for (const double x : {p.dense_ms, p.exact_ms, p.predicted_ms, p.row_ms, p.prefill_token_ms, p.context_token_ms}) {
    CHECK(std::isfinite(x) && x >= 0.0) << x;
  }
}

void Run(absl::string_view bytes) {
  FuzzInput input(bytes);
  CostModel costs;
  while (!input.empty()) {
    StepShape shape;
    const uint8_t kind = input.Byte();
    shape.tier = kAllTiers[kind % 5];
    shape.decode_rows = (kind & 0x20) != 0 ? static_cast<int32_t>(input.Below(1024)) : kind >> 6;
    shape.prefill_rows = static_cast<int32_t>((kind & 0x10) != 0 ? input.Below(1 << 16) : 0);
    shape.context_tokens = shape.decode_rows * static_cast<int64_t>(input.Below(1 << 16));
    // From a microsecond up to days, by orders of magnitude; repeated, because a fit needs more than one step.
    const double ms =
        std::min(kMostMs, std::ldexp(1.0 + input.Below(256) / 256.0, static_cast<int>(input.Below(41)) - 10));
    for (uint32_t i = 0, times = 1 + input.Below(20); i < times; ++i) costs.Observe(shape, ms);
    CheckFinite(costs);
    const double predicted = costs.Predict(shape);
    CHECK(std::isfinite(predicted) && predicted >= 0.0) << predicted;
  }
}

}  // namespace

FuzzTarget CostModelTarget() {
  return {"cost_model",
          512,
          Run,
          {Raw("\0\0\0\x80\x0c\x10\x21\0\1\0\x10\x80\x0c\x10\x40\0\0\x80\x26\0"), "a steady server, then a pause",
           std::string(64, '\x31') + std::string(64, '\xff') + std::string(64, '\x31')},
          {Raw("\0\0\0\0\x0a\x13"), Raw("\x20\0\1\0\1\0\x28\0"), Raw("\x12\0\x40\0\0\x80\x0b\x13")}};
}

}  // namespace dejavu
