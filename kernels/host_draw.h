// HostDraw: Backend::Draw of a row of logits that the host has, plainly: the CPU backend's for rows that want more than
// a draw, and what other devices are held against. Its memory grows to the largest row and then stays. One thread.
#ifndef KERNELS_HOST_DRAW_H_
#define KERNELS_HOST_DRAW_H_

#include <cstdint>
#include <vector>

#include "kernels/backend.h"

namespace dejavu {

// The logarithm of the sum of exp over a row.
double LogSumExp(const float* logits, int64_t count);
// How many are larger, plus 1.
int32_t RankIn(const float* logits, int64_t count, int32_t id);

class HostDraw {
 public:
  struct Row {
    const float* logits = nullptr;  // [count]
    int64_t count = 0;
    int64_t candidates = 0;                // ids below may be chosen
    const int32_t* draw = nullptr;         // [kDrawFields]
    const int32_t* adjustments = nullptr;  // [any, kAdjustFields]
    int32_t* details = nullptr;            // [kDetailFields], where the draw asks for them
  };
  // The token, kNotFinite or kNothingAllowed.
  int32_t Choose(const Row& row);

  // The `count` most likely, ties by id, as DrawRank has them. Valid until the next call.
  const std::vector<uint64_t>& Top(const float* logits, int64_t vocab, int32_t count);

 private:
  const float* Adjust(const Row& row);
  void KeepTopK(int32_t k);
  void KeepTopP(float p);
  void Describe(const Row& row, int32_t id);

  std::vector<float> adjusted_;   // [count]
  std::vector<uint64_t> ranked_;  // of candidates or of all, as DrawRank has them
};

}  // namespace dejavu

#endif  // KERNELS_HOST_DRAW_H_
