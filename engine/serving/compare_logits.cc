#include "engine/serving/compare_logits.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/fast_exp.h"

namespace dejavu {
namespace {

// The sum of function(i) over 0 ... count, with several sums side by side: one after the other would wait for itself.
template <typename Function>
double Sum(int32_t count, const Function& function) {
  constexpr int32_t kSums = 16;
  double sums[kSums] = {};
  int32_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    float terms[kSums];
    for (int32_t k = 0; k < kSums; ++k) terms[k] = function(i + k);
    for (int32_t k = 0; k < kSums; ++k) sums[k] += terms[k];
  }
  double sum = 0.0;
  for (; i < count; ++i) sum += function(i);
  for (const double part : sums) sum += part;
  return sum;
}

float ExpBelow(float x) { return FastExp(std::max(x, -80.0f)); }

double LogSumExp(const float* logits, int32_t count, float largest) {
  return largest + std::log(Sum(count, [=](int32_t i) { return ExpBelow(logits[i] - largest); }));
}

}  // namespace

LogitsComparison CompareLogits(const float* p, const float* q, int32_t count) {
  const float* const top_p = std::max_element(p, p + count);
  const float* const top_q = std::max_element(q, q + count);
  const double log_p = LogSumExp(p, count, *top_p), log_q = LogSumExp(q, count, *top_q);
  LogitsComparison comparison;
  comparison.same_top = top_p - p == top_q - q;
  // sum of p (log p - log q); what both logarithms have in common comes out of the sum, so that equal rows give 0.
  const auto shift = static_cast<float>(log_p);
  const double difference = Sum(count, [=](int32_t i) { return ExpBelow(p[i] - shift) * (p[i] - q[i]); });
  comparison.kl_nats = std::max(0.0, difference - (log_p - log_q));
  return comparison;
}

}  // namespace dejavu
