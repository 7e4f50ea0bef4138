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

bool Draws::Plan(const std::vector<std::unique_ptr<Sequence>>& running, int32_t ahead, Batch& batch) {
  batch.adjustments.clear();
  batch.draws.assign(batch.logit_rows.size(), {});
  batch.keeps_logits = false;
  bool more = false;
  for (const auto& s : running) {
    if (s->step_logits == 0) continue;
    if (s->scores()) batch.keeps_logits = true;
    if (s->draws()) {
      PlanRows(*s, ahead, batch);
      for (int32_t i = 0; i < s->step_logits; ++i) {
        more = more || (batch.draws[s->first_logit + i][kDrawWants] & kDrawMore) != 0;
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
void Draws::PlanRows(const Sequence& s, int32_t ahead, Batch& batch) {
  const absl::Span<const int32_t> drafts = s.round.drafts;
  if (s.step_use == Sequence::Use::kText) return PlanRow(s, s.first_logit + s.step_logits - 1, ahead, batch);
  WithOutput counts(hand_out_.counts(s));
  const bool check = s.step_use == Sequence::Use::kCheck;
  for (int32_t i = 0; i < s.step_logits; ++i) {
    const int32_t before = check ? i : static_cast<int32_t>(drafts.size());
    counts.Grow(drafts.first(before));
    PlanRow(s, s.first_logit + i, before, batch);
  }
}

void Draws::PlanRow(const Sequence& s, int32_t row, int32_t ahead, Batch& batch) {
  const Request& r = s.request;
  const int32_t generated = s.generated_tokens() + ahead;
  banned_.clear();
  AddBanned(shape_, r, generated, &banned_);
  DrawFields& draw = batch.draws[row];
  draw = PlanDraw(r.sampling, hand_out_.counts(s), banned_, static_cast<uint64_t>(generated), &batch.adjustments);
  if (!r.logprobs || s.step_use == Sequence::Use::kDraft) return;
  draw[kDrawWants] |= kDrawMore | kDrawLogprobs;
  if (r.top_logprobs <= kMostTop) {
    draw[kDrawTop] = std::min(r.top_logprobs, shape_.vocab);
  } else {
    batch.keeps_logits = true;
  }
}

bool Draws::MayFollow(const std::vector<std::unique_ptr<Sequence>>& running) {
  return std::none_of(running.begin(), running.end(), [](const auto& s) { return IsPenalised(s->request.sampling); });
}

}  // namespace dejavu
