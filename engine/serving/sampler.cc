#include "engine/serving/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/base/check.h"
#include "kernels/draw.h"

namespace dejavu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

}  // namespace

void TokenCounts::Clear() {
  for (int32_t id : distinct_) counts_[id] = Count();
  distinct_.clear();
}

TokenCounts::Count& TokenCounts::Touch(int32_t id) {
  Count& count = counts_[id];
  if (count.prompt + count.output == 0) distinct_.push_back(id);
  return count;
}

Sampler::Sampler(int32_t vocab, int32_t sampled_vocab)
    : vocab_(vocab), sampled_vocab_(sampled_vocab), adjusted_(vocab) {
  CHECK(0 < sampled_vocab && sampled_vocab <= vocab) << sampled_vocab << " of " << vocab;
  candidates_.reserve(vocab);
  top_.reserve(vocab);
}

// Bias, allowed and banned tokens, then penalties. Returns `logits` itself where there is nothing to do, the usual
// case.
const float* Sampler::Adjust(const float* logits, const SamplingParams& params, const TokenCounts& counts,
                             absl::Span<const int32_t> banned) {
  const bool penalised =
      params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f || params.frequency_penalty != 0.0f;
  if (!penalised && params.logit_bias.empty() && params.allowed_token_ids.empty() && banned.empty()) return logits;

  if (params.allowed_token_ids.empty()) {
    std::copy(logits, logits + vocab_, adjusted_.begin());
  } else {
    std::fill(adjusted_.begin(), adjusted_.end(), kMinusInfinity);
    for (int32_t id : params.allowed_token_ids) adjusted_[id] = logits[id];
  }
  for (const auto& [id, bias] : params.logit_bias) adjusted_[id] += bias;
  if (penalised) {
    for (int32_t id : counts.distinct()) {
      float& logit = adjusted_[id];
      if (logit == kMinusInfinity) continue;
      logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
      const int32_t seen = counts.of(id).output;
      if (seen > 0) logit -= params.presence_penalty + params.frequency_penalty * static_cast<float>(seen);
      logit = std::clamp(logit, -kLargest, kLargest);  // a penalty of 1e-38 must not make infinities
    }
  }
  for (int32_t id : banned) adjusted_[id] = kMinusInfinity;
  return adjusted_.data();
}

// Better score first, lower id first among equals: a total order, so that every selection below is deterministic.
constexpr auto kBetter = [](const auto& a, const auto& b) {
  return a.score != b.score ? a.score > b.score : a.id < b.id;
};

void Sampler::KeepTopK(int32_t k) {
  if (k <= 0 || static_cast<size_t>(k) >= candidates_.size()) return;
  std::nth_element(candidates_.begin(), candidates_.begin() + k, candidates_.end(), kBetter);
  candidates_.resize(k);
}

// Keeps the smallest set of best tokens whose probability reaches p. Sorts in growing prefixes, because the set is
// usually small.
void Sampler::KeepTopP(float p) {
  if (p >= 1.0f) return;
  const float best = std::min_element(candidates_.begin(), candidates_.end(), kBetter)->score;
  double total = 0.0;
  for (const Candidate& c : candidates_) total += std::exp(c.score - best);
  double mass = 0.0;
  size_t sorted = 0;
  for (size_t kept = 0; kept < candidates_.size(); ++kept) {
    if (kept == sorted) {
      sorted = std::min(candidates_.size(), std::max<size_t>(64, 4 * sorted));
      std::partial_sort(candidates_.begin() + kept, candidates_.begin() + sorted, candidates_.end(), kBetter);
    }
    mass += std::exp(candidates_[kept].score - best);
    if (mass >= static_cast<double>(p) * total) {
      candidates_.resize(kept + 1);
      return;
    }
  }
}

bool Sampler::IsPlain(const SamplingParams& params) {
  const bool whole = params.top_k <= 0 && params.top_p >= 1.0f && params.min_p <= 0.0f;
  return (whole || params.temperature == 0.0f) && params.repetition_penalty == 1.0f &&
         params.presence_penalty == 0.0f && params.frequency_penalty == 0.0f && params.logit_bias.empty() &&
         params.allowed_token_ids.empty();
}

Sampler::Choice Sampler::Sample(const float* logits, const SamplingParams& params, const TokenCounts& counts,
                                absl::Span<const int32_t> banned, uint64_t step, bool with_logprob) {
  if (!AllFinite(logits, vocab_)) return {kNotFinite};
  const float* adjusted = Adjust(logits, params, counts, banned);
  const float* best = std::max_element(adjusted, adjusted + sampled_vocab_);
  if (*best == kMinusInfinity) return {kNothingAllowed};
  int32_t id = static_cast<int32_t>(best - adjusted);
  if (params.temperature > 0.0f) {
    Gather(adjusted, *best, params);
    GumbelMax draw(DrawKey(params.seed, step));
    for (const Candidate& c : candidates_) draw.Add(c.score, c.id);
    id = draw.chosen();
  }
  return with_logprob ? Describe(logits, id) : Choice{id};
}

void Sampler::Gather(const float* adjusted, float best, const SamplingParams& params) {
  const double inverse = 1.0 / static_cast<double>(params.temperature);
  candidates_.clear();
  for (int32_t id = 0; id < sampled_vocab_; ++id) {
    if (adjusted[id] == kMinusInfinity) continue;
    candidates_.push_back({DrawScore(adjusted[id], best, inverse), id});
  }
  KeepTopK(params.top_k);
  KeepTopP(params.top_p);
  if (params.min_p > 0.0f) {
    const float least = std::log(params.min_p);  // the best candidate has score 0
    std::erase_if(candidates_, [&](const Candidate& c) { return c.score < least; });
  }
}

double Sampler::LogSumExp(const float* logits) {
  const float best = *std::max_element(logits, logits + vocab_);
  double sum = 0.0;
  for (int32_t i = 0; i < vocab_; ++i) sum += std::exp(logits[i] - best);
  return best + std::log(sum);
}

Sampler::Choice Sampler::Describe(const float* logits, int32_t id) {
  Choice choice{id, static_cast<float>(logits[id] - LogSumExp(logits)), 1};
  for (int32_t i = 0; i < vocab_; ++i) choice.rank += logits[i] > logits[id];
  return choice;
}

absl::Span<const TokenLogprob> Sampler::Top(const float* logits, int32_t count) {
  if (count <= 0) return {};
  const double log_total = LogSumExp(logits);
  // A heap of the best so far, the worst of them in front.
  candidates_.clear();
  for (int32_t id = 0; id < vocab_; ++id) {
    const Candidate c{logits[id], id};
    if (static_cast<int32_t>(candidates_.size()) == count) {
      if (!kBetter(c, candidates_.front())) continue;
      std::pop_heap(candidates_.begin(), candidates_.end(), kBetter);
      candidates_.pop_back();
    }
    candidates_.push_back(c);
    std::push_heap(candidates_.begin(), candidates_.end(), kBetter);
  }
  std::sort_heap(candidates_.begin(), candidates_.end(), kBetter);
  top_.clear();
  for (const Candidate& c : candidates_) top_.push_back({c.id, static_cast<float>(c.score - log_total)});
  return top_;
}

}  // namespace dejavu
