#include "kernels/host_draw.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace dejavu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

float Float(int32_t bits) { return std::bit_cast<float>(bits); }

}  // namespace

double LogSumExp(const float* logits, int64_t count) {
  const float best = *std::max_element(logits, logits + count);
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += DrawMass(logits[i] - best);
  return best + std::log(static_cast<double>(sum) * kMassUnit);
}

int32_t RankIn(const float* logits, int64_t count, int32_t id) {
  int32_t rank = 1;
  for (int64_t i = 0; i < count; ++i) rank += logits[i] > logits[id];
  return rank;
}

// Returns the row's logits themselves where there is nothing to do.
const float* HostDraw::Adjust(const Row& row) {
  const int32_t count = row.draw[kDrawAdjustments];
  const bool only_adjusted = (row.draw[kDrawWants] & kDrawOnlyAdjusted) != 0;
  if (count == 0 && !only_adjusted) return row.logits;
  if (only_adjusted) {
    adjusted_.assign(row.count, kMinusInfinity);
  } else {
    adjusted_.assign(row.logits, row.logits + row.count);
  }
  const int32_t* entry = row.adjustments + int64_t{row.draw[kDrawAdjusted]} * kAdjustFields;
  for (int32_t i = 0; i < count; ++i, entry += kAdjustFields) {
    const int32_t id = entry[kAdjustId];
    adjusted_[id] = AdjustLogit(row.logits[id], Float(entry[kAdjustBias]), Float(entry[kAdjustMinus]),
                                entry[kAdjustFlags], Float(row.draw[kDrawPenalty]));
  }
  return adjusted_.data();
}

void HostDraw::KeepTopK(int32_t k) {
  if (k <= 0 || static_cast<size_t>(k) >= ranked_.size()) return;
  std::nth_element(ranked_.begin(), ranked_.begin() + k, ranked_.end());
  ranked_.resize(k);
}

// Keeps the smallest set of best tokens whose probability reaches p. Sorts in growing prefixes, because the set is
// usually small.
void HostDraw::KeepTopP(float p) {
  if (p >= 1.0f) return;
  uint64_t total = 0, mass = 0;
  for (const uint64_t rank : ranked_) total += DrawMass(ScoreOfRank(rank));
  const double goal = static_cast<double>(p) * static_cast<double>(total);
  size_t sorted = 0;
  for (size_t kept = 0; kept < ranked_.size(); ++kept) {
    if (kept == sorted) {
      sorted = std::min(ranked_.size(), std::max<size_t>(64, 4 * sorted));
      std::partial_sort(ranked_.begin() + static_cast<ptrdiff_t>(kept),
                        ranked_.begin() + static_cast<ptrdiff_t>(sorted), ranked_.end());
    }
    mass += DrawMass(ScoreOfRank(ranked_[kept]));
    if (static_cast<double>(mass) >= goal) return ranked_.resize(kept + 1);
  }
}

int32_t HostDraw::Choose(const Row& row) {
  if (!AllFinite(row.logits, row.count)) return kNotFinite;
  const float* adjusted = Adjust(row);
  const float* best = std::max_element(adjusted, adjusted + row.candidates);
  if (*best == kMinusInfinity) return kNothingAllowed;
  auto id = static_cast<int32_t>(best - adjusted);
  if (const float temperature = Float(row.draw[kDrawTemperature]); temperature > 0.0f) {
    const double inverse = 1.0 / static_cast<double>(temperature);
    ranked_.clear();
    for (int32_t i = 0; i < row.candidates; ++i) {
      if (adjusted[i] != kMinusInfinity) ranked_.push_back(DrawRank(DrawScore(adjusted[i], *best, inverse), i));
    }
    KeepTopK(row.draw[kDrawTopK]);
    KeepTopP(Float(row.draw[kDrawTopP]));
    GumbelMax drawn(static_cast<uint32_t>(row.draw[kDrawKeyLow]) |
                    static_cast<uint64_t>(static_cast<uint32_t>(row.draw[kDrawKeyHigh])) << 32);
    for (const uint64_t rank : ranked_) {
      const float score = ScoreOfRank(rank);
      if (score >= Float(row.draw[kDrawLeast])) drawn.Add(score, IdOfRank(rank));
    }
    id = drawn.chosen();
  }
  if ((row.draw[kDrawWants] & kDrawLogprobs) != 0) Describe(row, id);
  return id;
}

void HostDraw::Describe(const Row& row, int32_t id) {
  const double log_sum = LogSumExp(row.logits, row.count);
  row.details[kDetailLogprob] = std::bit_cast<int32_t>(static_cast<float>(row.logits[id] - log_sum));
  row.details[kDetailRank] = RankIn(row.logits, row.count, id);
  int32_t* to = row.details + kDetailTop;
  for (const uint64_t rank : Top(row.logits, row.count, row.draw[kDrawTop])) {
    *to++ = IdOfRank(rank);
    *to++ = std::bit_cast<int32_t>(static_cast<float>(ScoreOfRank(rank) - log_sum));
  }
}

const std::vector<uint64_t>& HostDraw::Top(const float* logits, int64_t vocab, int32_t count) {
  ranked_.clear();
  if (count <= 0) return ranked_;
  // A heap of the best so far, the worst of them in front.
  for (int32_t id = 0; id < vocab; ++id) {
    const uint64_t rank = DrawRank(logits[id], id);
    if (static_cast<int32_t>(ranked_.size()) == count) {
      if (rank > ranked_.front()) continue;
      std::pop_heap(ranked_.begin(), ranked_.end());
      ranked_.pop_back();
    }
    ranked_.push_back(rank);
    std::push_heap(ranked_.begin(), ranked_.end());
  }
  std::sort_heap(ranked_.begin(), ranked_.end());
  return ranked_;
}

}  // namespace dejavu
