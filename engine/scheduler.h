// Scheduler: which sequences run and what each contributes to the next step. First come, first served; a sequence is
// admitted when a slot and all the KV blocks that it can ever need are free, so nothing that runs is ever evicted. Pure
// bookkeeping: no threads, no device, no clock. Engine thread only.
#ifndef ENGINE_SCHEDULER_H_
#define ENGINE_SCHEDULER_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "engine/batch.h"
#include "engine/kv_cache.h"
#include "engine/sequence.h"

namespace dejavu {

class Scheduler {
 public:
  // `score_rows`: how many prompt positions may ask for logits in one step, all scored sequences together.
  Scheduler(KvPool& pool, int32_t slots, int32_t prefill_chunk_tokens, int32_t score_rows);

  void Enqueue(std::unique_ptr<Sequence> sequence);

  // Admits what fits and fills `batch` and each running sequence's step_* fields: one row for everything that decodes,
  // then prompts in chunks, in order of arrival, until the batch is full.
  void Plan(Batch& batch);

  // Takes a sequence out, wherever it is, and frees its slot and blocks.
  std::unique_ptr<Sequence> Remove(const Sequence& sequence);

  // In order of arrival. Remove and Plan change them.
  const std::vector<std::unique_ptr<Sequence>>& running() const { return running_; }
  const std::deque<std::unique_ptr<Sequence>>& waiting() const { return waiting_; }

 private:
  void Admit(Batch& batch);
  void AddRows(Sequence& sequence, int32_t rows, Batch& batch);

  KvPool& pool_;
  const int32_t prefill_chunk_tokens_;
  const int32_t score_rows_;
  std::vector<int32_t> free_slots_;  // a stack
  std::vector<std::unique_ptr<Sequence>> running_;
  std::deque<std::unique_ptr<Sequence>> waiting_;
};

}  // namespace dejavu

#endif  // ENGINE_SCHEDULER_H_
