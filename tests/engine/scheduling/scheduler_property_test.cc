// Scheduler and admission under long random sequences of events: what must hold after every one of them.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "engine/scheduling/admission.h"
#include "engine/scheduling/scheduler.h"
#include "gtest/gtest.h"

namespace dejavu {
namespace {

constexpr int kBlocks = 24, kBlockTokens = 4, kContext = 64;

class World {
 public:
  // `crowded`: more arrive than can be served, most of them urgent.
  World(uint64_t seed, bool overcommit, bool crowded)
      : crowded_(crowded),
        random_(seed),
        pool_(kBlocks, kBlockTokens),
        scheduler_(pool_, Options(overcommit)),
        admission_(Bounds(), Options(overcommit)),
        batch_(16, 4 + 6, 4, kContext / kBlockTokens) {}

  static SchedulerOptions Options(bool overcommit) {
    SchedulerOptions options;
    options.max_batch = 4;
    options.prefill_chunk_tokens = 6;
    options.least_prefill_tokens = 2;
    options.score_rows = 6;
    options.ageing_s = 0.5;
    options.overcommit = overcommit;
    options.tenant_weights = "b=3";
    return options;
  }
  static AdmissionOptions Bounds() {
    AdmissionOptions options;
    options.max_waiting_requests = 12;
    options.max_waiting_tokens = 200;
    options.tenant_max_waiting_requests = 8;
    return options;
  }

  void Event() {
    const int what = Draw(100);
    if (what < (crowded_ ? 40 : 30)) {
      Arrive();
    } else if (what < (crowded_ ? 94 : 84)) {
      Step();
    } else if (what < (crowded_ ? 95 : 90)) {
      Cancel();
    } else if (what < 99) {
      now_ += std::chrono::milliseconds(Draw(200));
      EndOverdue();
    } else {
      Fault();
    }
    Check();
  }

  void Finish() {
    for (int i = 0; i < 5000 && !(scheduler_.running().empty() && scheduler_.waiting().empty()); ++i) Step();
    Check();
    ASSERT_TRUE(scheduler_.running().empty() && scheduler_.waiting().empty()) << "something never ends";
    ASSERT_EQ(pool_.free(), pool_.total());
    ASSERT_EQ(admission_.account().live, 0);
    ASSERT_EQ(admission_.waiting(), 0);
  }

  int64_t preemptions() const { return preemptions_; }
  int64_t checked() const { return checked_; }
  int64_t accepted() const { return accepted_; }

 private:
  int Draw(int below) { return std::uniform_int_distribution<int>(0, below - 1)(random_); }

  void Arrive() {
    Request r;
    const int family = Draw(4), length = 1 + Draw(28);
    for (int i = 0; i < length; ++i) r.prompt.push_back(i < 16 ? 1000 * family + i : Draw(3));
    r.score = Draw(12) == 0;
    r.max_new_tokens = Draw(r.score ? 2 : 40) == 0 ? 0 : 1 + Draw(20);
    r.urgency = crowded_ && Draw(4) != 0 ? Urgency::kInteractive : static_cast<Urgency>(Draw(3));
    r.priority = Draw(3);
    r.tenant = std::string(1, static_cast<char>('a' + Draw(3)));
    r.sparsity.tier = kAllTiers[Draw(5)];
    r.sparsity.deterministic = Draw(2) == 0;
    r.speculation.mode = static_cast<SpeculationMode>(Draw(3));
    r.speculation.draft_tier = kAllTiers[Draw(5)];
    r.speculation.lookup = Draw(2) == 0;
    r.speculation.most_tokens = 1 + Draw(8);
    if (Draw(crowded_ ? 40 : 4) == 0) r.deadline = now_ + std::chrono::milliseconds(1 + Draw(400));
    if (!admission_.Admit(r, now_).ok()) return;
    auto s = std::make_unique<Sequence>(r, nullptr);
    s->id = next_id_++;
    s->arrival = now_;
    if (!r.score && Draw(5) != 0) s->keys = BlockKeys(r.tenant, "", r.prompt, kBlockTokens);
    alive_.insert(s->id);
    scheduler_.Enqueue(std::move(s));
  }

  void Step() {
    EndOverdue();
    std::map<uint64_t, const Sequence*> before;
    for (const auto& s : scheduler_.waiting()) before[s->id] = s.get();
    scheduler_.Plan(now_, batch_);
    CheckAdmissions(before);
    for (Sequence* s : scheduler_.admitted()) admission_.Scheduled(s->request);
    for (Sequence* s : scheduler_.preempted()) {
      ASSERT_FALSE(s->request.sparsity.deterministic && IsPredicted(s->request.sparsity.tier))
          << s->id << " would be computed in another tier";
      ASSERT_FALSE(s->request.score) << s->id << " would be told twice";
      ++preemptions_;
      admission_.Requeued(s->request);
      old_.erase(s->id);  // it counts anew
    }
    CheckBatch();
    std::vector<const Sequence*> done;
    for (const auto& s : scheduler_.running()) {
      if (s->step_rows == 0 || s->step_logits == 0) continue;
      if (s->step_use == Sequence::Use::kDraft) {
        s->round.drafts.push_back(Draw(3));
        if (Draw(10) == 0) s->round.wanted = static_cast<int32_t>(s->round.drafts.size());
      } else if (s->draws(*s) ? TakeTokens(*s) : s->computed + s->step_rows == s->prompt_tokens()) {
        done.push_back(s.get());
      }
    }
    const double ms = 1.0 + 0.1 * batch_.rows();
    scheduler_.NoteStep(ms);
    now_ += std::chrono::microseconds(static_cast<int64_t>(1000 * ms));
    for (const Sequence* s : done) End(*s, FinishReason::kLength);
    scheduler_.Inform(admission_);
  }

  // What the step brings `s`; whether it ends by that.
  bool TakeTokens(Sequence& s) {
    const int32_t before = s.generated_tokens(), drafted = static_cast<int32_t>(s.round.drafts.size());
    bool more = true, ends = false;
    while (more && !ends) {
      more = s.Take(Draw(3));
      ends = s.generated_tokens() == s.request.max_new_tokens || Draw(15) == 0;
    }
    const int32_t tokens = s.generated_tokens() - before;
    EXPECT_LE(tokens, 1 + drafted);
    checked_ += drafted > 0;
    accepted_ += tokens - 1;
    return ends;
  }

  // Nobody is passed by the less urgent, but by those that have waited long; and these are not passed for ever.
  void CheckAdmissions(const std::map<uint64_t, const Sequence*>& before) {
    const auto ageing = std::chrono::milliseconds(500);
    for (const Sequence* a : scheduler_.admitted()) {
      ++admissions_;
      old_.erase(a->id);
      if (a->arrival + ageing <= now_) continue;
      for (const auto& w : scheduler_.waiting()) {
        if (!before.contains(w->id) || !w->keys.empty()) continue;
        ASSERT_GE(w->request.urgency, a->request.urgency) << w->id << " was passed by " << a->id;
        if (w->request.urgency == a->request.urgency && w->tenant == a->tenant) {
          ASSERT_LE(w->request.priority, a->request.priority) << w->id << " was passed by " << a->id;
        }
      }
    }
    for (const auto& w : scheduler_.waiting()) {
      if (w->arrival + ageing > now_ || !w->keys.empty() || w->request.urgency == Urgency::kBatch) continue;
      const auto [it, fresh] = old_.try_emplace(
          w->id, admissions_ + Scheduler::kAgedTurn * (static_cast<int64_t>(scheduler_.waiting().size()) + 4));
      ASSERT_LE(admissions_, it->second) << w->id << " starves";
    }
  }

  void CheckBatch() {
    ASSERT_LE(batch_.rows(), batch_.max_rows);
    std::map<int32_t, int> users;
    for (const auto& s : scheduler_.running()) {
      for (int32_t block : s->blocks) ++users[block];
    }
    int32_t drafting = 0;
    bool waits = false;
    for (const auto& s : scheduler_.running()) waits = waits || !s->decodes();
    for (const auto& s : scheduler_.running()) {
      const bool drafts = s->step_rows > 0 && s->step_use == Sequence::Use::kDraft;
      const int first = s->computed + (drafts ? static_cast<int>(s->round.drafts.size()) : 0);
      drafting += drafts;
      ASSERT_LE(first + s->step_rows, static_cast<int>(s->blocks.size()) * kBlockTokens);
      if (s->step_rows > 0) {
        ASSERT_EQ(batch_.positions[s->first_row], first);
      }
      for (int i = 0; i < s->step_rows; ++i) {
        const int32_t block = s->blocks[(first + i) / kBlockTokens];
        ASSERT_EQ(users[block], 1) << "a shared block would be written";
        ASSERT_EQ(batch_.block_table[s->slot * batch_.blocks_per_slot + (first + i) / kBlockTokens], block);
      }
      if (s->round.open()) {
        ASSERT_TRUE(s->decodes() && s->speculates()) << s->id;
      }
      if (drafts && waits) {
        ASSERT_EQ(s->request.speculation.mode, SpeculationMode::kAlways) << "a prompt waits for it";
      }
    }
    if (drafting > 0) {
      ASSERT_EQ(drafting, batch_.rows()) << "a step drafts or makes text";
    }
    draft_steps_ = drafting > 0 ? draft_steps_ + 1 : 0;
    ASSERT_LE(draft_steps_, 8) << "nobody gets a token";
    ASSERT_EQ(static_cast<int>(users.size()), pool_.total() - pool_.free()) << "blocks are lost";
  }

  void Cancel() {
    std::vector<const Sequence*> all;
    for (const auto& s : scheduler_.running()) all.push_back(s.get());
    for (const auto& s : scheduler_.waiting()) all.push_back(s.get());
    if (!all.empty()) End(*all[Draw(static_cast<int>(all.size()))], FinishReason::kCancelled);
  }

  void Fault() {
    while (!scheduler_.running().empty()) End(*scheduler_.running().front(), FinishReason::kError);
  }

  void EndOverdue() {
    std::vector<const Sequence*> overdue;
    for (const auto& s : scheduler_.running()) {
      if (s->request.deadline <= now_) overdue.push_back(s.get());
    }
    for (const auto& s : scheduler_.waiting()) {
      if (s->request.deadline <= now_) overdue.push_back(s.get());
    }
    for (const Sequence* s : overdue) End(*s, FinishReason::kDeadline);
  }

  void End(const Sequence& sequence, FinishReason reason) {
    const bool waiting = sequence.slot < 0;
    const auto s = scheduler_.Remove(sequence);
    ASSERT_EQ(alive_.erase(s->id), 1u) << s->id << " ended twice";
    old_.erase(s->id);
    admission_.Ended(s->request, reason, waiting);
  }

  void Check() {
    const Account& a = admission_.account();
    ASSERT_EQ(a.received, a.finished + a.refused_total() + a.cancelled + a.failed + a.live);
    ASSERT_EQ(a.live, static_cast<int64_t>(alive_.size()));
    ASSERT_EQ(alive_.size(), scheduler_.running().size() + scheduler_.waiting().size());
    ASSERT_EQ(admission_.waiting(), static_cast<int64_t>(scheduler_.waiting().size()));
    if (++checks_ % 16 == 0) pool_.CheckConsistent();
  }

  const bool crowded_;
  std::mt19937_64 random_;
  BlockPool pool_;
  Scheduler scheduler_;
  Admission admission_;
  Batch batch_;
  SteadyTime now_;
  uint64_t next_id_ = 1;
  int64_t admissions_ = 0, preemptions_ = 0, checks_ = 0;
  int64_t checked_ = 0, accepted_ = 0;
  int draft_steps_ = 0;  // in a row
  std::set<uint64_t> alive_;
  std::map<uint64_t, int64_t> old_;  // who has waited long, and by which admission it must have been its turn
};

TEST(SchedulerProperty, HoldsOverAMillionRandomEvents) {
  constexpr int kSeeds = 100, kEvents = 10'000;
  int64_t preemptions = 0, checked = 0, accepted = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    World world(seed, /*overcommit=*/seed % 2 == 1, /*crowded=*/seed % 4 >= 2);
    for (int event = 0; event < kEvents; ++event) {
      world.Event();
      if (testing::Test::HasFatalFailure()) FAIL() << "event " << event;
    }
    world.Finish();
    if (testing::Test::HasFatalFailure()) return;
    preemptions += world.preemptions();
    checked += world.checked();
    accepted += world.accepted();
  }
  EXPECT_GT(preemptions, 500);
  EXPECT_GT(checked, 10'000);
  EXPECT_GT(accepted, 10'000);
}

}  // namespace
}  // namespace dejavu
