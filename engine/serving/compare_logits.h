// How far two next-token distributions are apart. Pure arithmetic; any thread.
#ifndef ENGINE_SERVING_COMPARE_LOGITS_H_
#define ENGINE_SERVING_COMPARE_LOGITS_H_

#include <cstdint>

namespace dejavu {

// KL(p || q) in nats and whether both have the same most likely entry, for the softmax of two rows of logits.
struct LogitsComparison {
  double kl_nats = 0.0;
  bool same_top = false;
};
LogitsComparison CompareLogits(const float* p, const float* q, int32_t count);

}  // namespace dejavu

#endif  // ENGINE_SERVING_COMPARE_LOGITS_H_
