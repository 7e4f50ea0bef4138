#include "engine/serving/draws.h"

#include <algorithm>
#include <bit>

#include "engine/serving/sampler.h"
#include "kernels/draw.h"

namespace dejavu {

bool MayDraw(const std::vector<std::unique_ptr<Sequence>>& running) {
  const auto wants_logits = [](const auto& s) {
    const Request& r = s->request;
    return s->step_logits > 0 &&
           (r.score || r.logprobs || !Sampler::IsPlain(r.sampling) || s->generated_tokens() < r.min_new_tokens);
  };
  return std::none_of(running.begin(), running.end(), wants_logits);
}

void PlanDraws(const std::vector<std::unique_ptr<Sequence>>& running, int32_t ahead, Batch& batch) {
  batch.draws.resize(batch.logit_rows.size());
  for (const auto& s : running) {
    if (s->step_logits == 0) continue;
    const SamplingParams& p = s->request.sampling;
    const uint64_t key = DrawKey(p.seed, static_cast<uint64_t>(s->generated_tokens() + ahead));
    auto& draw = batch.draws[s->first_logit];
    draw[kDrawTemperature] = std::bit_cast<int32_t>(p.temperature);
    draw[kDrawKeyLow] = static_cast<int32_t>(static_cast<uint32_t>(key));
    draw[kDrawKeyHigh] = static_cast<int32_t>(static_cast<uint32_t>(key >> 32));
  }
}

}  // namespace dejavu
