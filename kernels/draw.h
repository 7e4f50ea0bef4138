// How a token is chosen from a row of logits (Backend::Draw), what hosts and devices must do alike. Logits are
// adjusted; then the best is taken, or at a temperature they become scores, of which top-k, top-p and min-p keep the
// best, and one is drawn by the Gumbel-max trick: argmax(score + G(key, id)), where G is Gumbel noise hashed from its
// two arguments. It is exact, needs no normalisation, and does not depend on the order or the number of candidates that
// a device happens to look at (Gumbel 1954; Maddison et al., arXiv 1411.0030). Nor do sums of probabilities, which are
// integers. Compiled for devices, too.
#ifndef KERNELS_DRAW_H_
#define KERNELS_DRAW_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef DJ_DEVICE
#define DJ_DEVICE inline
#endif

namespace dejavu {

// How Draw chooses for a row, as columns of int32 [rows, kDrawFields]; the bits of a float32 where one is meant. Zeros
// in all fields: the most likely token.
enum DrawField {
  kDrawTemperature,  // float; 0: no draw
  kDrawKeyLow,       // of DrawKey
  kDrawKeyHigh,
  kDrawWants,        // DrawWants, or-ed; without kDrawMore the fields below have no effect
  kDrawTopK,         // 0: all
  kDrawTopP,         // float; 1 or more: all
  kDrawLeast,        // float: the least score, that of the best being 0
  kDrawPenalty,      // float: of repetition
  kDrawAdjusted,     // the first of the row's adjustments,
  kDrawAdjustments,  // and how many there are
  kDrawTop,          // the most likely of the unadjusted logits that are wanted, kMostTop at most
  kDrawFields,
};
enum DrawWants : int32_t {
  kDrawMore = 1,          // the row is not decided by temperature and logits alone
  kDrawOnlyAdjusted = 2,  // only the ids of the row's adjustments may be chosen
  kDrawLogprobs = 4,      // its details are wanted
};

// Of the token of a row, as columns of int32 [any, kAdjustFields]. The ids of a row differ.
enum AdjustField {
  kAdjustId,
  kAdjustBias,   // float, added first
  kAdjustMinus,  // float, subtracted after the penalty of repetition, of tokens that have it
  kAdjustFlags,  // AdjustFlags, or-ed
  kAdjustFields,
};
enum AdjustFlags : int32_t {
  kAdjustRepeated = 1,  // the penalty of repetition applies
  kAdjustBanned = 2,
};

// What is known of the token of a row besides, as columns of int32 [rows, kDetailFields]. Of the unadjusted logits.
constexpr int32_t kMostTop = 128;
enum DetailField {
  kDetailLogprob,  // float: of the chosen one
  kDetailRank,     // 1: none is more likely
  kDetailTop,      // of each of the most likely its id and its log-probability, a float
  kDetailFields = kDetailTop + 2 * kMostTop,
};

// In the place of a token.
constexpr int32_t kNotFinite = -1;
constexpr int32_t kNothingAllowed = -2;

// An id of Backend::Embed that stands for the one at `place` of those that Draw has chosen; its own inverse.
DJ_DEVICE int32_t DrawnId(int32_t place) { return -1 - place; }

// What Draw's choice for a row is worth beside those from other logits of the row, as columns of float32 [rows,
// kBestFields]: the largest logit, and by how much the score of what was drawn differs from that one's.
enum BestField { kBestLogit, kBestScore, kBestFields };

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

// exp(score) in units of 2^-40, for scores up to 0: sums of them are the same in any order.
DJ_DEVICE uint64_t DrawMass(float score) { return static_cast<uint64_t>(expf(score) * 0x1p40f); }
constexpr double kMassUnit = 0x1p-40;

// A number for a score and an id: the better score first, of equals the lower id, in ascending order of the numbers.
DJ_DEVICE uint64_t DrawRank(float score, int32_t id) {
  const float value = score + 0.0f;  // no -0
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t ascending = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(id);
}
DJ_DEVICE int32_t IdOfRank(uint64_t rank) { return static_cast<int32_t>(static_cast<uint32_t>(rank)); }
DJ_DEVICE float ScoreOfRank(uint64_t rank) {
  const uint32_t ascending = ~static_cast<uint32_t>(rank >> 32);
  const uint32_t bits = (ascending & 0x80000000u) != 0 ? ascending & 0x7FFFFFFFu : ~ascending;
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

// By an adjustment's fields and the row's penalty of repetition (arXiv 1909.05858). A penalty near 0 makes no
// infinities.
DJ_DEVICE float AdjustLogit(float logit, float bias, float minus, int32_t flags, float penalty) {
  constexpr float kLargest = 3.402823466e38f;
  if ((flags & kAdjustBanned) != 0) return -INFINITY;
  logit += bias;
  if ((flags & kAdjustRepeated) == 0) return logit;
  logit = logit > 0 ? logit / penalty : logit * penalty;
  logit -= minus;
  return logit < -kLargest ? -kLargest : logit > kLargest ? kLargest : logit;
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
