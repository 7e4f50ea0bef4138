#include "engine/scheduler.h"

#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

constexpr int kBlockTokens = 4, kSlots = 3, kMaxRows = 12, kChunk = 8, kScoreRows = 2, kContext = 64;

class SchedulerTest : public testing::Test {
 protected:
  Sequence& Enqueue(int prompt_tokens, int max_new_tokens, bool score = false) {
    Request request;
    request.prompt.resize(prompt_tokens);
    std::iota(request.prompt.begin(), request.prompt.end(), 100);
    request.max_new_tokens = max_new_tokens;
    request.score = score;
    auto sequence = std::make_unique<Sequence>(next_id_++, std::move(request), nullptr);
    Sequence& reference = *sequence;
    scheduler_.Enqueue(std::move(sequence));
    return reference;
  }

  // Plans a step and plays the engine: rows are computed and whoever is up to date samples a token.
  void Step() {
    scheduler_.Plan(batch_);
    for (const auto& s : scheduler_.running()) {
      s->computed += s->step_rows;
      if (s->step_rows > 0 && s->uncomputed() == 0 && !s->request.score) s->tokens.push_back(7);
    }
  }

  KvPool pool_{16, kBlockTokens};
  Scheduler scheduler_{pool_, kSlots, kChunk, kScoreRows};
  Batch batch_{kMaxRows, kSlots + kScoreRows, kSlots, kContext / kBlockTokens};
  uint64_t next_id_ = 1;
};

TEST_F(SchedulerTest, CutsAPromptIntoChunksAndWantsLogitsAfterItsLastTokenOnly) {
  const Sequence& s = Enqueue(18, 2);
  Step();
  EXPECT_EQ(batch_.rows(), 8);
  EXPECT_THAT(batch_.logit_rows, IsEmpty());
  Step();
  EXPECT_EQ(batch_.rows(), 8);
  Step();
  EXPECT_THAT(batch_.tokens, ElementsAre(116, 117));
  EXPECT_THAT(batch_.positions, ElementsAre(16, 17));
  EXPECT_THAT(batch_.logit_rows, ElementsAre(1));
  Step();
  EXPECT_THAT(batch_.tokens, ElementsAre(7));
  EXPECT_THAT(batch_.positions, ElementsAre(18));
  EXPECT_EQ(s.step_logits, 1);
}

TEST_F(SchedulerTest, DecodesBeforeItPrefillsAndSharesTheRestOfTheStep) {
  Enqueue(3, 10);
  Step();
  Enqueue(20, 2);
  Enqueue(20, 2);
  Step();
  EXPECT_EQ(batch_.rows(), kMaxRows);  // 1 to decode, 8 of the first prompt, 3 of the second
  EXPECT_THAT(batch_.row_slots, ElementsAre(0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2));
  EXPECT_THAT(batch_.logit_rows, ElementsAre(0));
}

TEST_F(SchedulerTest, ReservesEveryBlockThatASequenceCanNeedAndKeepsTheOrderOfArrival) {
  Enqueue(20, 20);                   // 10 blocks of 16
  Enqueue(20, 8);                    // 7: does not fit beside it
  const auto& last = Enqueue(1, 1);  // would fit, but came later
  Step();
  EXPECT_EQ(scheduler_.running().size(), 1u);
  EXPECT_EQ(pool_.free(), 6);
  scheduler_.Remove(*scheduler_.running().front());
  EXPECT_EQ(pool_.free(), 16);
  Step();
  EXPECT_EQ(scheduler_.running().size(), 2u);
  EXPECT_EQ(scheduler_.running().back().get(), &last);
  EXPECT_EQ(pool_.free(), 8);
}

TEST_F(SchedulerTest, ABlockBelongsToOneSequence) {
  Enqueue(9, 3);
  Enqueue(9, 3);
  Step();
  std::vector<int32_t> blocks;
  for (const auto& s : scheduler_.running()) blocks.insert(blocks.end(), s->blocks.begin(), s->blocks.end());
  std::sort(blocks.begin(), blocks.end());
  EXPECT_EQ(std::unique(blocks.begin(), blocks.end()), blocks.end());
  for (const auto& s : scheduler_.running()) {
    for (size_t i = 0; i < s->blocks.size(); ++i) {
      EXPECT_EQ(batch_.block_table[s->slot * batch_.blocks_per_slot + i], s->blocks[i]);
    }
  }
}

TEST_F(SchedulerTest, SlotsBoundWhatRunsAndAreReused) {
  for (int i = 0; i < 5; ++i) Enqueue(1, 4);
  Step();
  EXPECT_EQ(scheduler_.running().size(), 3u);
  EXPECT_EQ(scheduler_.waiting().size(), 2u);
  const int slot = scheduler_.running()[1]->slot;
  scheduler_.Remove(*scheduler_.running()[1]);
  Step();
  EXPECT_EQ(scheduler_.running().back()->slot, slot);
}

TEST_F(SchedulerTest, AScoredPromptWantsLogitsEverywhereInSmallSteps) {
  Enqueue(5, 0, /*score=*/true);
  Step();
  EXPECT_THAT(batch_.logit_rows, ElementsAre(0, 1));
  Step();
  EXPECT_THAT(batch_.positions, ElementsAre(2, 3));
  Step();
  EXPECT_THAT(batch_.positions, ElementsAre(4));
}

TEST_F(SchedulerTest, RemovesWhatWaits) {
  const Sequence& a = Enqueue(40, 20);
  const Sequence& b = Enqueue(40, 20);
  Step();
  EXPECT_EQ(scheduler_.Remove(b).get(), &b);
  EXPECT_THAT(scheduler_.waiting(), IsEmpty());
  scheduler_.Remove(a);
  EXPECT_EQ(pool_.free(), pool_.total());
}

}  // namespace
}  // namespace dejavu
