// The next token of each row, chosen where the logits are (Backend::Draw): a block a row, two passes over 4 bytes for
// each id of the vocabulary, which the product before has just written. Rows that want more than a draw take a pass or
// two for each thing that they want. Of the best that top-k, top-p or the list of the most likely ask for, a few
// hundred are collected and sorted; where those do not decide it, which is rare, a search over the row does.
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

constexpr int kShort = 16;  // loads under way where little is done with each
// Calls function(i, logits[i]) for this thread's share of 0 ... count - 1, in order. A block has a row for itself:
// without many loads under way it would wait for each.
template <int kUnderWay = 4, typename Function>
DJ_DEVICE void ForEachLogit(const float* logits, int count, const Function& function) {
  for (int first = Thread(); first < count; first += kUnderWay * kBlockThreads) {
    float values[kUnderWay];
#pragma unroll
    for (int k = 0; k < kUnderWay; ++k) {
      const int i = first + k * kBlockThreads;
      values[k] = i < count ? logits[i] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kUnderWay; ++k) {
      const int i = first + k * kBlockThreads;
      if (i < count) function(i, values[k]);
    }
  }
}

constexpr uint64_t kNoRank = ~uint64_t{0};
constexpr int kRankThread = 128;  // as the so many best threads' best, what is collected starts
constexpr int kMostBest = 512;    // of what is collected
static_assert(kRankThread >= kMostTop && kMostBest >= kBlockThreads);

// Shared memory of a block.
struct DrawMemory {
  uint64_t *found, *best;  // [kMostBest]
  uint64_t* word;          // [1]
  uint32_t* counter;       // [1]
  uint64_t* sums;          // [kWarps]
};

DJ_DEVICE uint64_t BlockTotal(uint64_t value, const DrawMemory& memory) {
  for (int step = 16; step > 0; step /= 2) {
    const uint32_t low = __shfl_xor_sync(kAllLanes, static_cast<uint32_t>(value), step);
    const uint32_t high = __shfl_xor_sync(kAllLanes, static_cast<uint32_t>(value >> 32), step);
    value += static_cast<uint64_t>(high) << 32 | low;
  }
  __syncthreads();
  if (Lane() == 0) memory.sums[Warp()] = value;
  __syncthreads();
  uint64_t sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += memory.sums[w];
  return sum;
}

// The ranks up to `last` of 0 ... count - 1, sorted, in memory.best. Returns how many; 0: there are too many.
template <typename Ranked>
DJ_DEVICE int Collect(const Ranked& of, uint64_t last, const DrawMemory& memory) {
  if (Thread() == 0) memory.counter[0] = 0;
  __syncthreads();
  ForEachLogit(of.logits, of.count, [&](int i, float logit) {
    const uint64_t rank = of.Rank(i, logit);
    if (rank > last || rank == kNoRank) return;
    const uint32_t place = atomicAdd(memory.counter, 1u);
    if (place < kMostBest) memory.found[place] = rank;
  });
  __syncthreads();
  const int n = static_cast<int>(memory.counter[0]);
  if (n > kMostBest) return 0;
  for (int i = Thread(); i < n; i += kBlockThreads) {
    const uint64_t rank = memory.found[i];
    int before = 0;
    for (int k = 0; k < n; ++k) before += memory.found[k] < rank;
    memory.best[before] = rank;
  }
  __syncthreads();
  return n;
}

// Likewise the best, all that there are or kRankThread at least: those up to the best of the thread that is the
// kRankThread-th, by its best, of all threads.
template <typename Ranked>
DJ_DEVICE int CollectBest(const Ranked& of, const DrawMemory& memory) {
  uint64_t mine = kNoRank;
  ForEachLogit(of.logits, of.count, [&](int i, float logit) {
    const uint64_t rank = of.Rank(i, logit);
    if (rank < mine) mine = rank;
  });
  __syncthreads();
  memory.found[Thread()] = mine;
  __syncthreads();
  int before = 0;
  for (int t = 0; t < kBlockThreads; ++t) {
    before += memory.found[t] < mine || (memory.found[t] == mine && t < Thread());
  }
  if (before == kRankThread - 1) memory.word[0] = mine;
  __syncthreads();
  return Collect(of, memory.word[0], memory);
}

// The least rank up to which the ranks weigh `goal`, each 1 or its mass; `most` where all up to it weigh less.
template <typename Ranked>
DJ_DEVICE uint64_t Reach(const Ranked& of, bool by_mass, double goal, uint64_t most, const DrawMemory& memory) {
  constexpr int kCuts = 7;
  uint64_t low = 0, high = most;  // what is looked for is in low ... high
  while (low < high) {
    const uint64_t part = (high - low) / (kCuts + 1);
    uint64_t weights[kCuts] = {};
    ForEachLogit(of.logits, of.count, [&](int i, float logit) {
      const uint64_t rank = of.Rank(i, logit);
      if (rank > high) return;
      const uint64_t weight = by_mass ? DrawMass(ScoreOfRank(rank)) : 1;
#pragma unroll
      for (int k = 0; k < kCuts; ++k) weights[k] += rank <= low + part * (k + 1) ? weight : 0;
    });
    uint64_t from = low, to = high;
#pragma unroll
    for (int k = kCuts - 1; k >= 0; --k) {
      const uint64_t cut = low + part * (k + 1);
      if (static_cast<double>(BlockTotal(weights[k], memory)) >= goal) {
        to = cut;
      } else if (from == low) {
        from = cut + 1;
      }
    }
    low = from;
    high = to;
  }
  return low;
}

// What a row may be drawn from: all of its logits, or those of its adjustments alone.
struct Choices {
  const float* logits;  // [count]
  const int32_t* ids;   // in the adjustments; nullptr: the index is the id
  int count, end;       // ids below `end`
  float best;
  double inverse;

  DJ_DEVICE int32_t Id(int i) const { return ids == nullptr ? i : ids[i * kAdjustFields]; }
  DJ_DEVICE uint64_t Rank(int i, float logit) const {
    const int id = Id(i);
    return id >= end || logit == -INFINITY ? kNoRank : DrawRank(DrawScore(logit, best, inverse), id);
  }
};

// All logits of a row, by what they are.
struct Likeliest {
  const float* logits;
  int count;
  DJ_DEVICE uint64_t Rank(int i, float logit) const { return DrawRank(logit, i); }
};

DJ_DEVICE float FloatField(const int32_t* fields, int field) {
  return __uint_as_float(static_cast<uint32_t>(fields[field]));
}

// The first of the sorted ranks up to which they weigh `goal`; kNoRank where they do not.
DJ_DEVICE uint64_t ReachSorted(int n, double goal, const DrawMemory& memory) {
  for (int i = Thread(); i < n; i += kBlockThreads) memory.found[i] = DrawMass(ScoreOfRank(memory.best[i]));
  __syncthreads();
  if (Thread() == 0) {
    uint64_t mass = 0, reached = kNoRank;
    for (int i = 0; i < n && reached == kNoRank; ++i) {
      mass += memory.found[i];
      if (static_cast<double>(mass) >= goal) reached = memory.best[i];
    }
    memory.word[0] = reached;
  }
  __syncthreads();
  return memory.word[0];
}

// The last rank that top-k, top-p and the least score leave.
DJ_DEVICE uint64_t LastKept(const Choices& choices, const int32_t* draw, const DrawMemory& memory) {
  const int top_k = draw[kDrawTopK];
  const float top_p = FloatField(draw, kDrawTopP);
  uint64_t last = kNoRank - 1;
  if (top_k > 0 || top_p < 1.0f) {
    const int n = CollectBest(choices, memory);
    if (top_k > 0) {
      last = top_k <= n ? memory.best[top_k - 1] : Reach(choices, false, top_k, last, memory);
    }
    if (top_p < 1.0f) {
      uint64_t mass = 0;
      ForEachLogit(choices.logits, choices.count, [&](int i, float logit) {
        const uint64_t rank = choices.Rank(i, logit);
        if (rank <= last) mass += DrawMass(ScoreOfRank(rank));
      });
      const double goal = static_cast<double>(top_p) * static_cast<double>(BlockTotal(mass, memory));
      const uint64_t reached = ReachSorted(n, goal, memory);
      last = reached != kNoRank ? reached : Reach(choices, true, goal, last, memory);
    }
  }
  const uint64_t least = DrawRank(FloatField(draw, kDrawLeast), INT32_MAX);
  return least < last ? least : last;
}

// Of the unadjusted logits: the sum's logarithm, and the most likely ones to the row's details.
DJ_DEVICE double DescribeRow(const DrawParams& p, const float* logits, const int32_t* draw, int32_t* details,
                             const DrawMemory& memory) {
  float most = -INFINITY;
  ForEachLogit<kShort>(logits, p.count, [&](int, float logit) { most = fmaxf(most, logit); });
  double largest = most;
  BlockArgMax(largest, 0);
  most = static_cast<float>(largest);
  uint64_t mass = 0;
  ForEachLogit<kShort>(logits, p.count, [&](int, float logit) { mass += DrawMass(logit - most); });
  const double log_sum = largest + log(static_cast<double>(BlockTotal(mass, memory)) * kMassUnit);
  const int top = draw[kDrawTop];
  if (top == 0) return log_sum;
  const Likeliest likeliest = {logits, p.count};
  int n = CollectBest(likeliest, memory);
  if (n == 0) n = Collect(likeliest, Reach(likeliest, false, top, kNoRank - 1, memory), memory);
  for (int i = Thread(); i < Min(top, n); i += kBlockThreads) {
    const uint64_t rank = memory.best[i];
    details[kDetailTop + 2 * i] = IdOfRank(rank);
    const auto logprob = static_cast<float>(ScoreOfRank(rank) - log_sum);
    details[kDetailTop + 2 * i + 1] = static_cast<int32_t>(__float_as_uint(logprob));
  }
  return log_sum;
}

// Where all ids may be chosen the logits are adjusted, and scratch keeps what they were; otherwise scratch gets the
// adjusted ones.
DJ_DEVICE void Adjust(const DrawParams& p, float* logits, const int32_t* draw) {
  const bool only_adjusted = (draw[kDrawWants] & kDrawOnlyAdjusted) != 0;
  for (int i = Thread(); i < draw[kDrawAdjustments]; i += kBlockThreads) {
    const int at = draw[kDrawAdjusted] + i;
    const int32_t* entry = p.adjustments + int64_t{at} * kAdjustFields;
    float& logit = logits[entry[kAdjustId]];
    const float adjusted = AdjustLogit(logit, FloatField(entry, kAdjustBias), FloatField(entry, kAdjustMinus),
                                       entry[kAdjustFlags], FloatField(draw, kDrawPenalty));
    p.scratch[at] = only_adjusted ? adjusted : logit;
    if (!only_adjusted) logit = adjusted;
  }
  __syncthreads();
}

DJ_DEVICE void TakeBack(const DrawParams& p, float* logits, const int32_t* draw) {
  __syncthreads();
  if ((draw[kDrawWants] & kDrawOnlyAdjusted) != 0) return;
  for (int i = Thread(); i < draw[kDrawAdjustments]; i += kBlockThreads) {
    const int at = draw[kDrawAdjusted] + i;
    logits[p.adjustments[int64_t{at} * kAdjustFields]] = p.scratch[at];
  }
  __syncthreads();
}

// A row with adjusted logits.
DJ_DEVICE int32_t ChooseOne(const DrawParams& p, const float* logits, const int32_t* draw, const DrawMemory& memory) {
  Choices choices = {logits, nullptr, p.candidates, p.candidates, /*best=*/0.0f, /*inverse=*/1.0};
  if ((draw[kDrawWants] & kDrawOnlyAdjusted) != 0) {
    choices.logits = p.scratch + draw[kDrawAdjusted];
    choices.ids = p.adjustments + int64_t{draw[kDrawAdjusted]} * kAdjustFields + kAdjustId;
    choices.count = draw[kDrawAdjustments];
  }
  double largest = -INFINITY;
  int best = p.candidates;
  ForEachLogit(choices.logits, choices.count, [&](int i, float logit) {
    const int id = choices.Id(i);
    if (id >= choices.end || (logit <= largest && (logit != largest || id >= best))) return;
    largest = logit;
    best = id;
  });
  best = BlockArgMax(largest, best);
  if (largest == -INFINITY) return kNothingAllowed;
  const float temperature = FloatField(draw, kDrawTemperature);
  if (temperature == 0.0f) return best;
  choices.best = static_cast<float>(largest);
  choices.inverse = 1.0 / static_cast<double>(temperature);
  const uint64_t last = LastKept(choices, draw, memory);
  GumbelMax drawn(static_cast<uint32_t>(draw[kDrawKeyLow]) |
                  static_cast<uint64_t>(static_cast<uint32_t>(draw[kDrawKeyHigh])) << 32);
  ForEachLogit(choices.logits, choices.count, [&](int i, float logit) {
    const uint64_t rank = choices.Rank(i, logit);
    if (rank <= last) drawn.Add(ScoreOfRank(rank), IdOfRank(rank));
  });
  double score = drawn.best();
  return BlockArgMax(score, drawn.chosen() < 0 ? p.candidates : drawn.chosen());
}

// All logits are finite.
DJ_DEVICE void DrawMore(const DrawParams& p, int row, float* logits, const int32_t* draw) {
  DJ_SHARED(uint64_t, found, kMostBest);
  DJ_SHARED(uint64_t, sorted, kMostBest);
  DJ_SHARED(uint64_t, word, 1);
  DJ_SHARED(uint64_t, sums, kWarps);
  DJ_SHARED(uint32_t, counter, 1);
  const DrawMemory memory = {found, sorted, word, counter, sums};
  int32_t* details = Row(p.details, row);
  const bool described = (draw[kDrawWants] & kDrawLogprobs) != 0;
  const double log_sum = described ? DescribeRow(p, logits, draw, details, memory) : 0.0;
  Adjust(p, logits, draw);
  const int32_t token = ChooseOne(p, logits, draw, memory);
  TakeBack(p, logits, draw);
  if (Thread() == 0) p.tokens[row] = token;
  if (!described || token < 0) return;
  const float of_token = logits[token];
  uint64_t larger = 0;
  ForEachLogit<kShort>(logits, p.count, [&](int, float logit) { larger += logit > of_token; });
  larger = BlockTotal(larger, memory);
  if (Thread() != 0) return;
  details[kDetailLogprob] = static_cast<int32_t>(__float_as_uint(static_cast<float>(of_token - log_sum)));
  details[kDetailRank] = static_cast<int32_t>(larger) + 1;
}

DJ_KERNEL(Draw, DrawParams, kBlockThreads) {
  GridWait();
  GridLaunchDependents();
  const int row = static_cast<int>(blockIdx.x);
  float* logits = Row(p.logits, row);
  const int32_t* draw = Row(p.draws, row);
  constexpr uint32_t kExponent = 0x7F800000u;
  int not_finite = 0, best = p.candidates;
  float most = -INFINITY;
  ForEachLogit<kShort>(logits, p.count, [&](int i, float logit) {
    not_finite |= (__float_as_uint(logit) & kExponent) == kExponent;
    if (i < p.candidates && logit > most) {
      most = logit;
      best = i;
    }
  });
  if (__syncthreads_or(not_finite)) {
    if (Thread() == 0) p.tokens[row] = kNotFinite;
    return;
  }
  if ((draw[kDrawWants] & kDrawMore) != 0) return DrawMore(p, row, logits, draw);
  double largest = most, score = 0.0;
  int token = p.first + BlockArgMax(largest, best);
  const float temperature = FloatField(draw, kDrawTemperature);
  if (temperature != 0.0f) {
    const double inverse = 1.0 / static_cast<double>(temperature);
    GumbelMax drawn(static_cast<uint32_t>(draw[kDrawKeyLow]) |
                    static_cast<uint64_t>(static_cast<uint32_t>(draw[kDrawKeyHigh])) << 32);
    ForEachLogit(logits, p.candidates, [&](int i, float logit) {
      drawn.Add(DrawScore(logit, static_cast<float>(largest), inverse), p.first + i);
    });
    score = drawn.best();
    token = BlockArgMax(score, drawn.chosen() < 0 ? p.first + p.candidates : drawn.chosen());
  }
  if (Thread() != 0) return;
  p.tokens[row] = token;
  if (p.bests.data == nullptr) return;
  float* bests = Row(p.bests, row);
  bests[kBestLogit] = static_cast<float>(largest);
  bests[kBestScore] = static_cast<float>(score);
}

}  // namespace dejavu::cuda

#endif  // KERNELS_CUDA_DRAW_CUH_
