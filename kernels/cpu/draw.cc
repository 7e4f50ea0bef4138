#include <algorithm>
#include <bit>

#include "kernels/cpu/kernels.h"
#include "kernels/draw.h"

namespace dejavu::cpu {

int32_t Draw(const float* logits, int64_t count, int32_t candidates, const int32_t* draw) {
  if (!AllFinite(logits, count)) return -1;
  const float* best = std::max_element(logits, logits + candidates);
  const auto temperature = std::bit_cast<float>(draw[kDrawTemperature]);
  if (temperature == 0.0f) return static_cast<int32_t>(best - logits);
  const double inverse = 1.0 / static_cast<double>(temperature);
  GumbelMax drawn(static_cast<uint32_t>(draw[kDrawKeyLow]) |
                  static_cast<uint64_t>(static_cast<uint32_t>(draw[kDrawKeyHigh])) << 32);
  for (int32_t id = 0; id < candidates; ++id) drawn.Add(DrawScore(logits[id], *best, inverse), id);
  return drawn.chosen();
}

}  // namespace dejavu::cpu
