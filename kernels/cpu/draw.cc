#include <algorithm>
#include <bit>

#include "kernels/cpu/kernels.h"
#include "kernels/draw.h"

namespace dejavu::cpu {

int32_t Draw(const float* logits, int64_t count, Candidates candidates, const int32_t* draw, float* bests) {
  if (!AllFinite(logits, count)) return -1;
  const auto first = static_cast<int32_t>(candidates.first);
  const auto own = static_cast<int32_t>(std::clamp<int64_t>(candidates.end - candidates.first, 0, count));
  const float* best = std::max_element(logits, logits + own);
  const auto temperature = std::bit_cast<float>(draw[kDrawTemperature]);
  if (bests != nullptr) {
    bests[kBestLogit] = *best;
    bests[kBestScore] = 0.0f;
  }
  if (temperature == 0.0f) return first + static_cast<int32_t>(best - logits);
  const double inverse = 1.0 / static_cast<double>(temperature);
  GumbelMax drawn(static_cast<uint32_t>(draw[kDrawKeyLow]) |
                  static_cast<uint64_t>(static_cast<uint32_t>(draw[kDrawKeyHigh])) << 32);
  for (int32_t i = 0; i < own; ++i) drawn.Add(DrawScore(logits[i], *best, inverse), first + i);
  if (bests != nullptr) bests[kBestScore] = static_cast<float>(drawn.best());
  return drawn.chosen();
}

}  // namespace dejavu::cpu
