// Sampler: from a row of logits to the next token. TokenCounts: which tokens a sequence holds, for penalties. Memory is
// taken at construction; Sample allocates nothing. Engine thread only.
#ifndef ENGINE_SERVING_SAMPLER_H_
#define ENGINE_SERVING_SAMPLER_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "engine/request.h"

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
  void Clear();

  absl::Span<const int32_t> distinct() const { return distinct_; }
  const Count& of(int32_t id) const { return counts_[id]; }

 private:
  Count& Touch(int32_t id);
  std::vector<Count> counts_;      // [vocab]
  std::vector<int32_t> distinct_;  // ids with a count
};

class Sampler {
 public:
  // `vocab`: logits per row. `sampled_vocab`: ids from there on (padding of the embedding) are never chosen.
  Sampler(int32_t vocab, int32_t sampled_vocab);
  int32_t candidates() const { return sampled_vocab_; }

  static constexpr int32_t kNotFinite = -1;       // the logits hold NaN or infinity; what Backend::Draw says then
  static constexpr int32_t kNothingAllowed = -2;  // bias, allowed and banned tokens leave no candidate
  struct Choice {
    int32_t id = kNotFinite;
    float logprob = 0.0f;
    int32_t rank = 0;
  };

  // The next token for `logits` [vocab]. `step` is the number of tokens generated before it. `banned`: ids that may not
  // be chosen now (stop tokens before min_new_tokens). Logprob and rank are of the unmodified logits and filled only on
  // request.
  Choice Sample(const float* logits, const SamplingParams& params, const TokenCounts& counts,
                absl::Span<const int32_t> banned, uint64_t step, bool with_logprob);

  // Whether these alone choose a token without looking at anything but the logits: Backend::Draw can do it.
  static bool IsPlain(const SamplingParams& params);

  // Log-probability and rank of `id` under the unmodified logits.
  Choice Describe(const float* logits, int32_t id);

  // The `count` most likely tokens, ties by id. Valid until the next call.
  absl::Span<const TokenLogprob> Top(const float* logits, int32_t count);

 private:
  struct Candidate {
    float score;
    int32_t id;
  };

  const float* Adjust(const float* logits, const SamplingParams& params, const TokenCounts& counts,
                      absl::Span<const int32_t> banned);
  void Gather(const float* adjusted, float best, const SamplingParams& params);
  void KeepTopK(int32_t k);
  void KeepTopP(float p);
  double LogSumExp(const float* logits);

  const int32_t vocab_;
  const int32_t sampled_vocab_;
  std::vector<float> adjusted_;        // [vocab]
  std::vector<Candidate> candidates_;  // capacity vocab
  std::vector<TokenLogprob> top_;      // capacity vocab
};

}  // namespace dejavu

#endif  // ENGINE_SERVING_SAMPLER_H_
