#include "engine/serving/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/base/check.h"

namespace dejavu {
namespace {

constexpr int32_t kAllowed = 1 << 8;  // among AdjustFlags until the adjustments are complete

int32_t Bits(float value) { return std::bit_cast<int32_t>(value); }
float Float(int32_t bits) { return std::bit_cast<float>(bits); }

// Those of one id become one, from place `first` on.
void MergeAdjustments(size_t first, std::vector<AdjustFields>* adjustments) {
  const auto begin = adjustments->begin() + static_cast<ptrdiff_t>(first);
  std::sort(begin, adjustments->end(), [](const auto& a, const auto& b) { return a[kAdjustId] < b[kAdjustId]; });
  size_t end = first;
  for (size_t i = first; i < adjustments->size(); ++i) {
    const AdjustFields& next = (*adjustments)[i];
    if (end == first || (*adjustments)[end - 1][kAdjustId] != next[kAdjustId]) {
      (*adjustments)[end++] = next;
      continue;
    }
    AdjustFields& merged = (*adjustments)[end - 1];
    for (const AdjustField field : {kAdjustBias, kAdjustMinus}) {
      merged[field] = Bits(Float(merged[field]) + Float(next[field]));
    }
    merged[kAdjustFlags] |= next[kAdjustFlags];
  }
  adjustments->resize(end);
}

}  // namespace

bool IsPenalised(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

void TokenCounts::Clear() {
  for (int32_t id : distinct_) counts_[id] = Count();
  distinct_.clear();
}

void TokenCounts::TakeBackOutput(int32_t id) {
  Count& count = counts_[id];
  if (--count.output + count.prompt > 0) return;
  CHECK(distinct_.back() == id) << id << " was not the last";
  distinct_.pop_back();
}

TokenCounts::Count& TokenCounts::Touch(int32_t id) {
  Count& count = counts_[id];
  if (count.prompt + count.output == 0) distinct_.push_back(id);
  return count;
}

DrawFields PlanDraw(const SamplingParams& p, const TokenCounts& counts, absl::Span<const int32_t> banned, uint64_t step,
                    std::vector<AdjustFields>* adjustments) {
  const size_t first = adjustments->size();
  const auto adjust = [&](int32_t id, float bias, float minus, int32_t flags) {
    adjustments->push_back({id, Bits(bias), Bits(minus), flags});
  };
  for (const int32_t id : p.allowed_token_ids) adjust(id, 0.0f, 0.0f, kAllowed);
  for (const auto& [id, bias] : p.logit_bias) adjust(id, bias, 0.0f, 0);
  for (const int32_t id : banned) adjust(id, 0.0f, 0.0f, kAdjustBanned);
  const bool counted_alone = adjustments->size() == first;
  if (IsPenalised(p)) {
    for (const int32_t id : counts.distinct()) {
      const int32_t seen = counts.of(id).output;
      const float minus = seen > 0 ? p.presence_penalty + p.frequency_penalty * static_cast<float>(seen) : 0.0f;
      adjust(id, 0.0f, minus, kAdjustRepeated);
    }
  }
  if (!counted_alone) MergeAdjustments(first, adjustments);
  const bool only_allowed = !p.allowed_token_ids.empty();
  if (only_allowed) {
    const auto begin = adjustments->begin() + static_cast<ptrdiff_t>(first);
    adjustments->erase(
        std::remove_if(begin, adjustments->end(), [](const auto& a) { return (a[kAdjustFlags] & kAllowed) == 0; }),
        adjustments->end());
    for (size_t i = first; i < adjustments->size(); ++i) (*adjustments)[i][kAdjustFlags] &= ~kAllowed;
  }

  const uint64_t key = DrawKey(p.seed, step);
  const bool more = !Sampler::IsPlain(p) || adjustments->size() > first;
  DrawFields draw = {};
  draw[kDrawTemperature] = Bits(p.temperature);
  draw[kDrawKeyLow] = static_cast<int32_t>(static_cast<uint32_t>(key));
  draw[kDrawKeyHigh] = static_cast<int32_t>(static_cast<uint32_t>(key >> 32));
  draw[kDrawWants] = (more ? kDrawMore : 0) | (only_allowed ? kDrawOnlyAdjusted : 0);
  draw[kDrawTopK] = std::max(0, p.top_k);
  draw[kDrawTopP] = Bits(p.top_p);
  // The best candidate has score 0.
  draw[kDrawLeast] = Bits(p.min_p > 0.0f ? std::log(p.min_p) : -std::numeric_limits<float>::infinity());
  draw[kDrawPenalty] = Bits(p.repetition_penalty);
  draw[kDrawAdjusted] = static_cast<int32_t>(first);
  draw[kDrawAdjustments] = static_cast<int32_t>(adjustments->size() - first);
  return draw;
}

Sampler::Sampler(int32_t vocab, int32_t sampled_vocab) : vocab_(vocab), sampled_vocab_(sampled_vocab) {
  CHECK(0 < sampled_vocab && sampled_vocab <= vocab) << sampled_vocab << " of " << vocab;
}

bool Sampler::IsPlain(const SamplingParams& params) {
  const bool whole = params.top_k <= 0 && params.top_p >= 1.0f && params.min_p <= 0.0f;
  return (whole || params.temperature == 0.0f) && !IsPenalised(params) && params.logit_bias.empty() &&
         params.allowed_token_ids.empty();
}

Sampler::Choice Sampler::Sample(const float* logits, const SamplingParams& params, const TokenCounts& counts,
                                absl::Span<const int32_t> banned, uint64_t step, bool with_logprob) {
  adjustments_.clear();
  DrawFields draw = PlanDraw(params, counts, banned, step, &adjustments_);
  if (with_logprob) draw[kDrawWants] |= kDrawLogprobs;
  const int32_t id = host_draw_.Choose({.logits = logits,
                                        .count = vocab_,
                                        .candidates = sampled_vocab_,
                                        .draw = draw.data(),
                                        .adjustments = adjustments_.empty() ? nullptr : adjustments_[0].data(),
                                        .details = details_.data()});
  if (id < 0 || !with_logprob) return {id};
  return {id, Float(details_[kDetailLogprob]), details_[kDetailRank]};
}

Sampler::Choice Sampler::Describe(const float* logits, int32_t id) {
  return {id, static_cast<float>(logits[id] - LogSumExp(logits, vocab_)), RankIn(logits, vocab_, id)};
}

absl::Span<const TokenLogprob> Sampler::Top(const float* logits, int32_t count) {
  if (count <= 0) return {};
  const double log_sum = LogSumExp(logits, vocab_);
  top_.clear();
  for (const uint64_t rank : host_draw_.Top(logits, vocab_, count)) {
    top_.push_back({IdOfRank(rank), static_cast<float>(ScoreOfRank(rank) - log_sum)});
  }
  return top_;
}

}  // namespace dejavu
