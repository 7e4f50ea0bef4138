// The next token of each row, chosen where the logits are (Backend::Draw): a block a row, two passes over 4 bytes for
// each id of the vocabulary, which the product before has just written.
#ifndef KERNELS_CUDA_DRAW_CUH_
#define KERNELS_CUDA_DRAW_CUH_

#include "kernels/cuda/common.cuh"
#include "kernels/draw.h"

namespace dejavu::cuda {

// The id of the largest value of all threads, the lowest of equals, and that value, in all of them.
DJ_DEVICE int BlockArgMax(double& value, int id) {
  DJ_SHARED(double, values, kBlockThreads);
  DJ_SHARED(int, ids, kBlockThreads);
  __syncthreads();
  values[Thread()] = value;
  ids[Thread()] = id;
  for (int half = kBlockThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (Thread() >= half) continue;
    const double other = values[Thread() + half];
    const int other_id = ids[Thread() + half];
    if (other > values[Thread()] || (other == values[Thread()] && other_id < ids[Thread()])) {
      values[Thread()] = other;
      ids[Thread()] = other_id;
    }
  }
  __syncthreads();
  value = values[0];
  return ids[0];
}

DJ_KERNEL(Draw, DrawParams, kBlockThreads) {
  GridWait();
  GridLaunchDependents();
  const int row = static_cast<int>(blockIdx.x);
  const float* logits = Row(p.logits, row);
  const int32_t* draw = Row(p.draws, row);
  constexpr uint32_t kExponent = 0x7F800000u;
  int not_finite = 0, best = p.candidates;
  float most = -INFINITY;
  for (int i = Thread(); i < p.count; i += kBlockThreads) {
    const float logit = logits[i];
    not_finite |= (__float_as_uint(logit) & kExponent) == kExponent;
    if (i < p.candidates && logit > most) {
      most = logit;
      best = i;
    }
  }
  if (__syncthreads_or(not_finite)) {
    if (Thread() == 0) p.tokens[row] = -1;
    return;
  }
  double largest = most, score = 0.0;
  int token = p.first + BlockArgMax(largest, best);
  const float temperature = __uint_as_float(static_cast<uint32_t>(draw[0]));  // in the order of DrawField
  if (temperature != 0.0f) {
    const double inverse = 1.0 / static_cast<double>(temperature);
    GumbelMax drawn(static_cast<uint32_t>(draw[1]) | static_cast<uint64_t>(static_cast<uint32_t>(draw[2])) << 32);
    for (int i = Thread(); i < p.candidates; i += kBlockThreads) {
      drawn.Add(DrawScore(logits[i], static_cast<float>(largest), inverse), p.first + i);
    }
    score = drawn.best();
    token = BlockArgMax(score, drawn.chosen() < 0 ? p.first + p.candidates : drawn.chosen());
  }
  if (Thread() != 0) return;
  p.tokens[row] = token;
  if (p.bests.data == nullptr) return;
  float* bests = Row(p.bests, row);  // in the order of BestField
  bests[0] = static_cast<float>(largest);
  bests[1] = static_cast<float>(score);
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_DRAW_CUH_
