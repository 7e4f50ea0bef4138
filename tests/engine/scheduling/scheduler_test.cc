#include "engine/scheduling/scheduler.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

constexpr int kBlockTokens = 4, kSlots = 3, kMaxRows = 12, kChunk = 8, kScoreRows = 2, kContext = 64;

class SchedulerTest : public testing::Test {
 protected:
  static Request Asking(int prompt_tokens, int max_new_tokens, bool score = false) {
    Request request;
    request.prompt.resize(prompt_tokens);
    std::iota(request.prompt.begin(), request.prompt.end(), 100);
    request.max_new_tokens = max_new_tokens;
    request.score = score;
    return request;
  }
  static Request Of(Urgency urgency, const char* tenant = "") {
    Request request = Asking(4, 4);
    request.urgency = urgency;
    request.tenant = tenant;
    return request;
  }
  Sequence& Enqueue(int prompt_tokens, int max_new_tokens, bool score = false) {
    return Enqueue(Asking(prompt_tokens, max_new_tokens, score));
  }
  Sequence& Enqueue(Request request, bool shares = false) {
    auto sequence = std::make_unique<Sequence>(std::move(request), nullptr);
    sequence->id = next_id_++;
    sequence->arrival = now_;
    if (shares) sequence->keys = BlockKeys("", "", sequence->request.prompt, kBlockTokens);
    Sequence& reference = *sequence;
    scheduler_.Enqueue(std::move(sequence));
    return reference;
  }

  std::vector<uint64_t> Running() const {
    std::vector<uint64_t> ids;
    for (const auto& s : scheduler_.running()) ids.push_back(s->id);
    return ids;
  }

  // Plans a step and plays the engine: rows are computed and whoever is up to date samples a token.
  void Step() {
    scheduler_.Plan(now_, batch_);
    for (const auto& s : scheduler_.running()) {
      if (s->step_logits > 0 && s->draws(*s)) s->tokens.push_back(7);
    }
    scheduler_.NoteStep(1.0);
  }

  static SchedulerOptions Options() {
    SchedulerOptions options;
    options.max_batch = kSlots;
    options.prefill_chunk_tokens = kChunk;
    options.score_rows = kScoreRows;
    return options;
  }

  SteadyTime now_;
  BlockPool pool_{16, kBlockTokens};
  Scheduler scheduler_{pool_, Options()};
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

TEST_F(SchedulerTest, BehindAScoredPromptItDecodesAsAllDo) {
  Enqueue(3, 3, /*score=*/true);
  Step();
  EXPECT_THAT(batch_.logit_rows, ElementsAre(0, 1));
  Step();
  EXPECT_THAT(batch_.positions, ElementsAre(2));
  EXPECT_THAT(batch_.logit_rows, ElementsAre(0));
  EXPECT_EQ(batch_.decode_rows, 0);
  Step();
  EXPECT_THAT(batch_.positions, ElementsAre(3));
  EXPECT_EQ(batch_.decode_rows, 1);
}

TEST_F(SchedulerTest, TheMoreUrgentGoFirstThenPriorityThenTheEarlierDeadline) {
  Enqueue(Of(Urgency::kNormal));       // 1
  Enqueue(Of(Urgency::kInteractive));  // 2
  Request early = Of(Urgency::kNormal);
  early.deadline = now_ + std::chrono::seconds(1);
  Enqueue(early);  // 3
  Request preferred = Of(Urgency::kNormal);
  preferred.priority = 1;
  Enqueue(preferred);  // 4
  Step();
  EXPECT_THAT(Running(), ElementsAre(2, 4, 3));
}

TEST_F(SchedulerTest, ATierThatReadsMoreThanWhatRunsComesAfterThoseThatDoNot) {
  const auto of_tier = [](Tier tier) {
    Request request = Asking(4, 4);
    request.sparsity.tier = tier;
    return request;
  };
  Enqueue(of_tier(Tier::kBalanced));  // 1
  Step();
  Enqueue(of_tier(Tier::kDense));     // 2
  Enqueue(of_tier(Tier::kFast));      // 3
  Enqueue(of_tier(Tier::kBalanced));  // 4
  Step();
  EXPECT_THAT(Running(), ElementsAre(1, 3, 4));
  scheduler_.Remove(*scheduler_.running().back());
  now_ += std::chrono::seconds(20);
  Enqueue(of_tier(Tier::kFast));
  for (int i = 0; i < 20 && scheduler_.running().back()->id != 2; ++i) {
    scheduler_.Remove(*scheduler_.running().back());
    Enqueue(of_tier(Tier::kFast));
    Step();
  }
  EXPECT_THAT(Running(), testing::Contains(2)) << "but not for ever";
}

TEST_F(SchedulerTest, BatchNeverHoldsTheLastSlots) {
  SchedulerOptions options = Options();
  options.max_batch = 4;
  Scheduler scheduler(pool_, options);
  Batch batch(kMaxRows, 4 + kScoreRows, 4, kContext / kBlockTokens);
  for (int i = 0; i < 4; ++i) {
    auto s = std::make_unique<Sequence>(Of(Urgency::kBatch), nullptr);
    s->id = i;
    scheduler.Enqueue(std::move(s));
  }
  scheduler.Plan(now_, batch);
  EXPECT_EQ(scheduler.running().size(), 3u);
  EXPECT_EQ(scheduler.waiting().size(), 1u);
}

TEST_F(SchedulerTest, WhoHasWaitedLongGetsEveryEighthAdmission) {
  Enqueue(Of(Urgency::kBatch));  // 1
  now_ += std::chrono::seconds(20);
  int admitted = 0;
  for (; admitted < 20; ++admitted) {
    Enqueue(Of(Urgency::kInteractive));
    while (scheduler_.running().size() == 3) scheduler_.Remove(*scheduler_.running().front());
    Step();
    if (std::any_of(scheduler_.running().begin(), scheduler_.running().end(),
                    [](const auto& s) { return s->request.urgency == Urgency::kBatch; })) {
      break;
    }
    for (; scheduler_.running().size() < 3;) {
      Enqueue(Of(Urgency::kInteractive));
      Step();
    }
  }
  EXPECT_LE(scheduler_.running().back()->admission, 8u);
}

TEST_F(SchedulerTest, TenantsAreServedByTheirWeights) {
  SchedulerOptions options = Options();
  options.tenant_weights = "paying=3";
  BlockPool pool(64, kBlockTokens);
  Scheduler scheduler(pool, options);
  std::map<std::string, int> tokens;
  const auto top_up = [&](const char* tenant) {
    int waiting = 0;
    for (const auto& s : scheduler.waiting()) waiting += s->request.tenant == tenant;
    for (; waiting < 3; ++waiting) {
      auto s = std::make_unique<Sequence>(Of(Urgency::kNormal, tenant), nullptr);
      s->id = next_id_++;
      scheduler.Enqueue(std::move(s));
    }
  };
  for (int step = 0; step < 4000; ++step) {
    top_up("free");
    top_up("paying");
    scheduler.Plan(now_, batch_);
    std::vector<const Sequence*> done;
    for (const auto& s : scheduler.running()) {
      tokens[s->request.tenant] += s->step_rows;
      if (s->step_logits > 0) s->tokens.push_back(7);
      if (s->generated_tokens() == s->request.max_new_tokens) done.push_back(s.get());
    }
    scheduler.NoteStep(1.0);
    for (const Sequence* s : done) scheduler.Remove(*s);
  }
  EXPECT_NEAR(static_cast<double>(tokens["paying"]) / tokens["free"], 3.0, 0.3);
}

TEST_F(SchedulerTest, WhoWasIdleEarnsNoCredit) {
  for (int i = 0; i < 50; ++i) {
    Enqueue(Of(Urgency::kNormal, "a"));
    Step();
    while (!scheduler_.running().empty()) scheduler_.Remove(*scheduler_.running().front());
  }
  Enqueue(Of(Urgency::kNormal, "a"));
  Enqueue(Of(Urgency::kNormal, "b"));
  EXPECT_EQ(scheduler_.served("b", Urgency::kNormal), scheduler_.served("a", Urgency::kNormal));
}

TEST_F(SchedulerTest, PromptsLeaveTheStepWithinTheTarget) {
  CostParameters costs;
  costs.dense_ms = costs.exact_ms = costs.predicted_ms = 10.0;
  costs.prefill_token_ms = 1.0;
  SchedulerOptions options = Options();
  options.least_prefill_tokens = 2;
  Scheduler scheduler(pool_, options, CostModel(costs));
  const auto enqueue = [&](int prompt, double target_ms) {
    Request request = Asking(prompt, 8);
    request.inter_token_target_ms = target_ms;
    auto s = std::make_unique<Sequence>(std::move(request), nullptr);
    s->id = next_id_++;
    scheduler.Enqueue(std::move(s));
  };
  const auto step = [&] {
    scheduler.Plan(now_, batch_);
    for (const auto& s : scheduler.running()) {
      if (s->step_logits > 0) s->tokens.push_back(7);
    }
    const double ms = scheduler.costs().Predict(scheduler.shape());
    scheduler.NoteStep(ms);
    return ms;
  };
  enqueue(4, 0.0);
  step();  // alone: nothing limits it
  const auto urgent = [&] {
    Request request = Asking(6, 8);
    request.urgency = Urgency::kInteractive;
    auto s = std::make_unique<Sequence>(std::move(request), nullptr);
    s->id = next_id_++;
    Sequence& reference = *s;
    scheduler.Enqueue(std::move(s));
    return std::ref(reference);
  };
  enqueue(24, 0.0);
  EXPECT_NEAR(step(), 17.5, 1.0) << "three quarters more than the step by itself";
  EXPECT_EQ(batch_.rows(), 1 + 7);
  // The less urgent do not hold up the more urgent.
  Sequence& pressing = urgent();
  step();
  EXPECT_EQ(pressing.computed, 6);
}

TEST_F(SchedulerTest, APromptAlwaysAdvances) {
  CostParameters costs;
  costs.dense_ms = costs.exact_ms = costs.predicted_ms = 10.0;
  costs.prefill_token_ms = 1.0;
  SchedulerOptions options = Options();
  options.least_prefill_tokens = 2;
  options.inter_token_target_ms = 1.0;
  Scheduler scheduler(pool_, options, CostModel(costs));
  for (int i = 0; i < 2; ++i) {
    auto s = std::make_unique<Sequence>(Asking(8, 8), nullptr);
    s->id = i;
    scheduler.Enqueue(std::move(s));
    scheduler.Plan(now_, batch_);
    if (i == 1) break;
    scheduler.running()[0]->tokens.push_back(7);
    scheduler.NoteStep(1.0);
  }
  EXPECT_EQ(batch_.rows(), 1 + 2);
}

TEST_F(SchedulerTest, APrefixIsComputedOnceAndSharedByThoseThatWaitForIt) {
  const Sequence& first = Enqueue(Asking(9, 2), /*shares=*/true);
  const Sequence& second = Enqueue(Asking(9, 2), /*shares=*/true);
  Step();
  EXPECT_EQ(second.slot, -1) << "the first one is computing what it needs";
  EXPECT_EQ(first.computed, 8);
  Step();
  EXPECT_EQ(second.finish.cached_prompt_tokens, 8);
  EXPECT_THAT(absl::MakeSpan(second.blocks).first(2), ElementsAre(first.blocks[0], first.blocks[1]));
  EXPECT_NE(second.blocks[2], first.blocks[2]);
  while (!scheduler_.running().empty()) scheduler_.Remove(*scheduler_.running().front());
  EXPECT_EQ(pool_.free(), pool_.total());
  EXPECT_EQ(pool_.cached(), 2);
  pool_.CheckConsistent();
}

TEST_F(SchedulerTest, TheUrgentDoNotWaitForThePrefixOfTheLessUrgent) {
  Request batch = Asking(20, 2);
  batch.urgency = Urgency::kBatch;
  Enqueue(batch, /*shares=*/true);
  Step();
  Request pressing = Asking(20, 2);
  pressing.urgency = Urgency::kInteractive;
  const Sequence& s = Enqueue(pressing, /*shares=*/true);
  Step();
  EXPECT_GE(s.slot, 0);
  while (!scheduler_.running().empty()) {
    Step();
    pool_.CheckConsistent();
    scheduler_.Remove(*scheduler_.running().front());
  }
  EXPECT_EQ(pool_.free(), pool_.total());
}

TEST_F(SchedulerTest, AWholePromptThatIsKnownStillComputesItsLastToken) {
  Enqueue(Asking(8, 1), /*shares=*/true);
  Step();
  scheduler_.Remove(*scheduler_.running().front());
  const Sequence& again = Enqueue(Asking(8, 1), /*shares=*/true);
  Step();
  EXPECT_EQ(again.finish.cached_prompt_tokens, 4);
  EXPECT_EQ(again.step_rows, 4);
}

TEST_F(SchedulerTest, OvercommittedBlocksAreTakenAsNeededAndTheYoungestIsComputedAgain) {
  SchedulerOptions options = Options();
  options.overcommit = true;
  BlockPool pool(8, kBlockTokens);
  Scheduler scheduler(pool, options);
  for (int i = 0; i < 2; ++i) {
    auto s = std::make_unique<Sequence>(Asking(8, 20), nullptr);  // 7 blocks each in the end
    s->id = i;
    scheduler.Enqueue(std::move(s));
  }
  int preemptions = 0, most_running = 0;
  std::vector<uint64_t> finished;
  for (int step = 0; step < 200 && finished.size() < 2; ++step) {
    scheduler.Plan(now_, batch_);
    preemptions += static_cast<int>(scheduler.preempted().size());
    for (const Sequence* s : scheduler.preempted()) EXPECT_EQ(s->id, 1u) << "the younger one";
    most_running = std::max(most_running, static_cast<int>(scheduler.running().size()));
    std::vector<const Sequence*> done;
    for (const auto& s : scheduler.running()) {
      EXPECT_LE(s->computed + s->step_rows, static_cast<int>(s->blocks.size()) * kBlockTokens);
      if (s->step_logits > 0) s->tokens.push_back(7);
      if (s->generated_tokens() == 20) done.push_back(s.get());
    }
    scheduler.NoteStep(1.0);
    for (const Sequence* s : done) finished.push_back(scheduler.Remove(*s)->id);
  }
  EXPECT_THAT(finished, ElementsAre(0, 1));
  EXPECT_EQ(most_running, 2);
  EXPECT_GE(preemptions, 1);
  EXPECT_EQ(pool.free(), pool.total());
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
