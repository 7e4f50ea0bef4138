// Sampler: from a row of logits that the host has to the next token. PlanDraw: what a device is told that chooses it
// instead. TokenCounts: which tokens a sequence holds, for penalties. Engine thread only.
#ifndef ENGINE_SERVING_SAMPLER_H_
#define ENGINE_SERVING_SAMPLER_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "engine/request.h"
#include "kernels/draw.h"
#include "kernels/host_draw.h"

namespace dejavu {

// How often each token stands in one sequence.
class TokenCounts {
 public:
  explicit TokenCounts(int32_t vocab) : counts_(vocab) { distinct_.reserve(vocab); }

  struct Count {
    int32_t prompt = 0;
    int32_t output = 0;
  };
  void AddPrompt(int32_t id) { ++Touch(id).prompt; }
  void AddOutput(int32_t id) { ++Touch(id).output; }
  // The last AddOutput that has not been taken back.
  void TakeBackOutput(int32_t id);
  void Clear();

  absl::Span<const int32_t> distinct() const { return distinct_; }
  const Count& of(int32_t id) const { return counts_[id]; }

 private:
  Count& Touch(int32_t id);
  std::vector<Count> counts_;      // [vocab]
  std::vector<int32_t> distinct_;  // ids with a count
};

// Counts that hold some more output for a while: drafts.
class WithOutput {
 public:
  explicit WithOutput(TokenCounts& counts) : counts_(counts) {}
  ~WithOutput() {
    for (; !added_.empty(); added_.remove_suffix(1)) counts_.TakeBackOutput(added_.back());
  }
  WithOutput(const WithOutput&) = delete;
  WithOutput& operator=(const WithOutput&) = delete;

  // The first so many of `output`, which those that were there begin and which must outlive the object.
  void Grow(absl::Span<const int32_t> output) {
    for (size_t i = added_.size(); i < output.size(); ++i) counts_.AddOutput(output[i]);
    added_ = output;
  }

 private:
  TokenCounts& counts_;
  absl::Span<const int32_t> added_;
};

// Whether the tokens that a sequence holds matter.
bool IsPenalised(const SamplingParams& params);

using DrawFields = std::array<int32_t, kDrawFields>;
using AdjustFields = std::array<int32_t, kAdjustFields>;

// How a row's token is to be drawn that comes after `step` generated ones, where the sequence holds what `counts` says.
// `banned`: ids that may not be chosen now (stop tokens before min_new_tokens). The row's adjustments come behind those
// that are there.
DrawFields PlanDraw(const SamplingParams& params, const TokenCounts& counts, absl::Span<const int32_t> banned,
                    uint64_t step, std::vector<AdjustFields>* adjustments);

class Sampler {
 public:
  // `vocab`: logits per row. `sampled_vocab`: ids from there on (padding of the embedding) are never chosen.
  Sampler(int32_t vocab, int32_t sampled_vocab);
  int32_t candidates() const { return sampled_vocab_; }

  struct Choice {
    int32_t id = kNotFinite;  // or kNothingAllowed
    float logprob = 0.0f;
    int32_t rank = 0;
  };

  // The next token for `logits` [vocab], with the arguments of PlanDraw. Logprob and rank are of the unmodified logits
  // and filled only on request.
  Choice Sample(const float* logits, const SamplingParams& params, const TokenCounts& counts,
                absl::Span<const int32_t> banned, uint64_t step, bool with_logprob);

  // Whether temperature and logits alone decide.
  static bool IsPlain(const SamplingParams& params);

  // Log-probability and rank of `id` under the unmodified logits.
  Choice Describe(const float* logits, int32_t id);

  // The `count` most likely tokens, ties by id. Valid until the next call.
  absl::Span<const TokenLogprob> Top(const float* logits, int32_t count);

 private:
  const int32_t vocab_;
  const int32_t sampled_vocab_;
  HostDraw host_draw_;
  std::vector<AdjustFields> adjustments_;
  std::array<int32_t, kDetailFields> details_;
  std::vector<TokenLogprob> top_;
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_SAMPLER_H_
