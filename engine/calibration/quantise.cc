#include "engine/calibration/quantise.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/float16.h"

namespace dejavu {

SelectorData Quantise(const FloatSelector& selector, const std::vector<double>& shifts,
                      const std::vector<Tier>& tiers) {
  SelectorData data;
  const int64_t ranks = selector.a.rows, inputs = selector.a.cols, outputs = selector.b.cols;
  data.rank = static_cast<int32_t>(ranks);
  if (ranks == 0) return data;
  const auto quantise = [](const float* values, int64_t count, float factor, std::vector<int8_t>* to) {
    float largest = 1e-20f;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(values[i] * factor));
    const float step = largest / 127.0f;
    for (int64_t i = 0; i < count; ++i) {
      to->push_back(static_cast<int8_t>(std::lround(values[i] * factor / step)));
    }
    return step;
  };
  for (int64_t k = 0; k < ranks; ++k) {
    const float step = quantise(selector.b.row(k), outputs, 1.0f, &data.b);
    data.a_scale.push_back(quantise(selector.a.row(k), inputs, step, &data.a));
  }
  for (size_t i = 0; i < tiers.size(); ++i) {
    const FloatSelector::Point& point = selector.points[i];
    if (point.rank == 0) continue;
    OperatingPoint& to = data.points[static_cast<size_t>(tiers[i])].emplace();
    to.rank = point.rank;
    for (const float bias : point.bias) {
      to.thresholds.push_back(FloatFromFloat16(Float16FromFloat(static_cast<float>(-bias - shifts[i]))));
    }
  }
  return data;
}

}  // namespace dejavu
