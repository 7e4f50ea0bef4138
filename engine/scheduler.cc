#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

namespace dejavu {

Scheduler::Scheduler(KvPool& pool, int32_t slots, int32_t prefill_chunk_tokens, int32_t score_rows)
    : pool_(pool), prefill_chunk_tokens_(prefill_chunk_tokens), score_rows_(score_rows) {
  for (int32_t slot = slots - 1; slot >= 0; --slot) free_slots_.push_back(slot);
  running_.reserve(slots);
}

void Scheduler::Enqueue(std::unique_ptr<Sequence> sequence) {
  CHECK(pool_.BlocksFor(sequence->max_tokens()) <= pool_.total()) << sequence->max_tokens() << " tokens can never fit";
  waiting_.push_back(std::move(sequence));
}

void Scheduler::Plan(Batch& batch) {
  Admit(batch);
  batch.Clear();
  for (const auto& s : running_) {
    s->step_rows = s->step_logits = 0;
    if (s->decodes()) AddRows(*s, 1, batch);
  }
  int32_t score_rows_left = score_rows_;
  for (const auto& s : running_) {
    if (s->step_rows > 0) continue;
    int32_t rows = std::min({s->uncomputed(), prefill_chunk_tokens_, batch.rows_left()});
    if (s->request.score) {
      rows = std::min(rows, score_rows_left);
      score_rows_left -= rows;
    }
    AddRows(*s, rows, batch);
  }
}

void Scheduler::Admit(Batch& batch) {
  while (!waiting_.empty() && !free_slots_.empty()) {
    Sequence& next = *waiting_.front();
    next.blocks.resize(pool_.BlocksFor(next.max_tokens()));
    if (!pool_.Take(absl::MakeSpan(next.blocks))) {
      next.blocks.clear();
      return;
    }
    next.slot = free_slots_.back();
    free_slots_.pop_back();
    std::copy(next.blocks.begin(), next.blocks.end(),
              batch.block_table.begin() + static_cast<ptrdiff_t>(next.slot) * batch.blocks_per_slot);
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

// The next `rows` uncomputed tokens of the sequence. Logits are wanted after its last token, or, to score, after each.
void Scheduler::AddRows(Sequence& s, int32_t rows, Batch& batch) {
  s.step_rows = rows;
  s.first_row = batch.rows();
  s.first_logit = static_cast<int32_t>(batch.logit_rows.size());
  for (int32_t i = 0; i < rows; ++i) {
    const int32_t position = s.computed + i;
    const bool last = position + 1 == static_cast<int32_t>(s.tokens.size());
    const bool wants_logits = last || s.request.score;
    if (position >= s.prompt_tokens()) {
      batch.AddDecodeRow(s.slot, position, s.tokens[position], wants_logits, s.request.sparsity);
    } else {
      batch.AddRow(s.slot, position, s.tokens[position], wants_logits, std::min(s.request.sparsity.tier, Tier::kExact));
    }
    s.step_logits += wants_logits;
  }
}

std::unique_ptr<Sequence> Scheduler::Remove(const Sequence& sequence) {
  const auto is_it = [&](const std::unique_ptr<Sequence>& s) { return s.get() == &sequence; };
  std::unique_ptr<Sequence> removed;
  if (auto it = std::find_if(running_.begin(), running_.end(), is_it); it != running_.end()) {
    removed = std::move(*it);
    running_.erase(it);
    free_slots_.push_back(removed->slot);
    pool_.Give(removed->blocks);
  } else {
    auto waiting = std::find_if(waiting_.begin(), waiting_.end(), is_it);
    CHECK(waiting != waiting_.end()) << "sequence " << sequence.id << " is not here";
    removed = std::move(*waiting);
    waiting_.erase(waiting);
  }
  return removed;
}

}  // namespace dejavu
