#include "engine/serving/draws.h"

#include <algorithm>

#include "engine/serving/sampler.h"

namespace dejavu {

void AddBanned(const ModelShape& shape, const Request& r, int32_t generated, std::vector<int32_t>* banned) {
  banned->insert(banned->end(), r.sampling.unused_ids.begin(), r.sampling.unused_ids.end());
  if (generated >= r.min_new_tokens) return;
  if (!r.ignore_eos) banned->insert(banned->end(), shape.eos_tokens.begin(), shape.eos_tokens.end());
  banned->insert(banned->end(), r.stop_token_ids.begin(), r.stop_token_ids.end());
}

bool Draws::Plan(const std::vector<std::unique_ptr<Sequence>>& running, bool ahead, Batch& batch) {
  batch.adjustments.clear();
  batch.draws.assign(batch.logit_rows.size(), {});
  batch.keeps_logits = false;
  bool more = false;
  for (const auto& s : running) {
    const StepShare& share = ahead ? s->ahead : *s;
    if (share.step_logits == 0) continue;
    if (s->scores()) batch.keeps_logits = true;
    if (s->draws(share)) {
      PlanRows(*s, share, batch);
      for (int32_t i = 0; i < share.step_logits; ++i) {
        more = more || (batch.draws[share.first_logit + i][kDrawWants] & kDrawMore) != 0;
      }
    }
  }
  const bool can = batch.adjustments.size() <= Batch::kMostAdjustments && !(group_ && (more || batch.keeps_logits));
  if (can) return true;
  batch.draws.clear();
  batch.adjustments.clear();
  batch.keeps_logits = false;
  return false;
}

// A check's rows follow no draft, the first, the first two and so on; a draft's one row follows those that there are.
// Those that are not known yet count for no penalty (MayFollow).
void Draws::PlanRows(const Sequence& s, const StepShare& share, Batch& batch) {
  const absl::Span<const int32_t> drafts = s.round.drafts;
  // Of a prompt that is scored only what comes behind it is drawn.
  if (share.step_use == Sequence::Use::kText) {
    return PlanRow(s, share.first_logit + share.step_logits - 1, share.step_after, /*details=*/true, batch);
  }
  WithOutput counts(hand_out_.counts(s));
  for (int32_t i = 0; i < share.step_logits; ++i) {
    const int32_t generated = share.step_after + i;
    counts.Grow(drafts.first(std::min<size_t>(generated - s.generated_tokens(), drafts.size())));
    PlanRow(s, share.first_logit + i, generated, share.step_use != Sequence::Use::kDraft, batch);
  }
}

// For the token after so many generated ones.
void Draws::PlanRow(const Sequence& s, int32_t row, int32_t generated, bool details, Batch& batch) {
  const Request& r = s.request;
  banned_.clear();
  AddBanned(shape_, r, generated, &banned_);
  DrawFields& draw = batch.draws[row];
  draw = PlanDraw(r.sampling, hand_out_.counts(s), banned_, static_cast<uint64_t>(generated), &batch.adjustments);
  if (!r.logprobs || !details) return;
  draw[kDrawWants] |= kDrawMore | kDrawLogprobs;
  if (r.top_logprobs <= kMostTop) {
    draw[kDrawTop] = std::min(r.top_logprobs, shape_.vocab);
  } else {
    batch.keeps_logits = true;
  }
}

bool Draws::MayFollow(const std::vector<std::unique_ptr<Sequence>>& running) {
  return std::none_of(running.begin(), running.end(),
                      [](const auto& s) { return s->step_rows > 0 && IsPenalised(s->request.sampling); });
}

}  // namespace dejavu
