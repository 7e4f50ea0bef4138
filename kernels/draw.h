// The draw of a token by the Gumbel-max trick: argmax(score + G(key, id)), where G is Gumbel noise hashed from its two
// arguments. It is exact, needs no normalisation, and does not depend on the order or the number of candidates that a
// device happens to look at (Gumbel 1954; Maddison et al., arXiv 1411.0030). Compiled for devices, too.
#ifndef KERNELS_DRAW_H_
#define KERNELS_DRAW_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef DJ_DEVICE
#define DJ_DEVICE inline
#endif

namespace dejavu {

constexpr uint64_t kGoldenRatio = 0x9e3779b97f4a7c15u;

// Infinities and NaNs have all exponent bits set. On integers, so that the compiler can vectorise it.
inline bool AllFinite(const float* values, int64_t count) {
  uint32_t any = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof bits);
    any |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return any == 0;
}

// Sebastiano Vigna's splitmix64 finaliser.
DJ_DEVICE uint64_t MixBits(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Of the token number `step` that a request with that seed draws.
DJ_DEVICE uint64_t DrawKey(uint64_t seed, uint64_t step) {
  return MixBits(MixBits(seed + kGoldenRatio) + (step + 1) * kGoldenRatio);
}

// The score of a candidate at a temperature, relative to the best logit: differences cannot turn into NaN for a tiny
// temperature.
DJ_DEVICE float DrawScore(float logit, float best, double inverse_temperature) {
  const double score = (static_cast<double>(logit) - best) * inverse_temperature;
  return static_cast<float>(score > -1e30 ? score : -1e30);
}

// The best so far of the candidates that were added, in any order.
class GumbelMax {
 public:
  explicit DJ_DEVICE GumbelMax(uint64_t key) : key_(key) {}

  DJ_DEVICE void Add(float score, int32_t id) {
    constexpr uint64_t kOne = uint64_t{1} << 53;
    const uint64_t bits = MixBits(key_ + (static_cast<uint64_t>(id) + 1) * kGoldenRatio) >> 11;
    // With u = (bits + 0.5) / 2^53: what trails by g wins only with noise above g, that is with u > exp(-exp(-g)) >=
    // 1 - exp(-g) > 1 - 2^-floor(g). That saves the logarithms for nearly all of a large vocabulary.
    const double gap = best_ - score;
    if (gap >= 1.0 && kOne - bits > kOne >> static_cast<int>(gap < 53.0 ? gap : 53.0)) return;
    const double u = (static_cast<double>(bits) + 0.5) * 0x1p-53;
    Join(score - log(-log(u)), id);
  }
  // Another's best.
  DJ_DEVICE void Join(double sum, int32_t id) {
    if (sum > best_ || (sum == best_ && id < chosen_)) {
      best_ = sum;
      chosen_ = id;
    }
  }

  DJ_DEVICE double best() const { return best_; }
  DJ_DEVICE int32_t chosen() const { return chosen_; }  // -1: none was added

 private:
  const uint64_t key_;
  double best_ = -INFINITY;
  int32_t chosen_ = -1;
};

}  // namespace dejavu

#endif  // KERNELS_DRAW_H_
