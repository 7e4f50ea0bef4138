// Scheduler, block pool, admission and cost model together, as the engine's thread uses them, with an executor that
// takes whatever time the input says: steps that are interrupted for hours, and a clock that jumps between them. The
// books and the blocks balance after every event, and everything that came in ends.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/scheduling/admission.h"
#include "engine/scheduling/scheduler.h"
#include "tests/fuzz/target.h"

namespace dejavu {
namespace {

constexpr int32_t kContext = 40, kScoreRows = 3;

struct WorldLimits {
  SchedulerOptions scheduler;
  AdmissionOptions admission;
  int32_t block_tokens = 4, blocks = 16;
};

WorldLimits LimitsOf(FuzzInput* input) {
  WorldLimits limits;
  SchedulerOptions& s = limits.scheduler;
  s.max_batch = 1 + static_cast<int32_t>(input->Below(5));
  s.max_step_tokens = s.max_batch + static_cast<int32_t>(input->Below(16));
  s.prefill_chunk_tokens = 1 + static_cast<int32_t>(input->Below(8));
  s.least_prefill_tokens = 1 + static_cast<int32_t>(input->Below(4));
  s.score_rows = kScoreRows;
  s.ageing_s = input->Below(4);
  const uint32_t switches = input->Below(16);
  s.overcommit = (switches & 1) != 0;
  if ((switches & 2) != 0) s.inter_token_target_ms = 5.0;
  if ((switches & 4) != 0) s.tenant_weights = "b=3,c=0.25";
  AdmissionOptions& a = limits.admission;
  a.max_waiting_requests = 1 + static_cast<int32_t>(input->Below(16));
  a.max_waiting_tokens = 32 * input->Below(8);
  a.tenant_max_waiting_requests = static_cast<int32_t>(input->Below(8));
  a.tenant_max_waiting_tokens = 16 * input->Below(8);
  a.deadline_slack = (switches & 8) != 0 ? 0.0 : 1.0;
  limits.block_tokens = 1 + static_cast<int32_t>(input->Below(8));
  // One sequence of full context fits, perhaps nothing beside it.
  limits.blocks = (kContext + limits.block_tokens - 1) / limits.block_tokens + static_cast<int32_t>(input->Below(24));
  return limits;
}

class World {
 public:
  World(const WorldLimits& limits, FuzzInput* input)
      : limits_(limits),
        input_(*input),
        pool_(limits.blocks, limits.block_tokens),
        scheduler_(pool_, limits.scheduler),
        admission_(limits.admission, limits.scheduler),
        batches_{MakeBatch(limits), MakeBatch(limits)},
        drawn_(batches_[0].max_logit_rows) {}

  void Event() {
    const uint32_t what = input_.Below(32);
    if (what < 12) {
      Arrive();
    } else if (what < 25) {
      Step();
    } else if (what < 27) {
      EndSome(FinishReason::kCancelled);
    } else if (what < 28) {
      while (!scheduler_.running().empty()) End(*scheduler_.running().front(), FinishReason::kError);
    } else if (what < 29) {
      EndWaiting();
    } else {
      now_ += AnyTime();
    }
    Check();
  }

  // Everything ends by itself in steps of the usual length.
  void Finish() {
    // What a sequence may wait for: each running one's last token, and prefixes that others compute.
    const size_t most = 100 * (scheduler_.running().size() + scheduler_.waiting().size() + 1);
    for (size_t i = 0; i < most && !idle(); ++i) Step();
    CHECK(idle()) << scheduler_.running().size() << " run and " << scheduler_.waiting().size() << " wait for ever";
    Check();
    CHECK(pool_.free() == pool_.total()) << pool_.free() << " blocks are free of " << pool_.total();
    CHECK(admission_.account().live == 0 && admission_.waiting() == 0) << admission_.waiting();
    CHECK(admission_.waiting_prompt_tokens() == 0) << admission_.waiting_prompt_tokens();
    CheckAdmitsWhileIdle();
  }

 private:
  static Batch MakeBatch(const WorldLimits& limits) {
    return {limits.scheduler.max_step_tokens, limits.scheduler.max_batch + kScoreRows, limits.scheduler.max_batch,
            (kContext + limits.block_tokens - 1) / limits.block_tokens};
  }
  Batch& batch() { return batches_[current_]; }
  bool idle() const { return scheduler_.running().empty() && scheduler_.waiting().empty(); }
  // From microseconds to weeks.
  SteadyTime::duration AnyTime() {
    return std::chrono::microseconds(int64_t{1 + input_.Below(256)} << input_.Below(34));
  }

  // Whatever steps it has seen, a server that has nothing to do admits a call that it can finish in time, if perhaps
  // not at once: it learns nothing from those that it refuses.
  void CheckAdmitsWhileIdle() {
    constexpr int kMostRefusals = 360;
    Request r;
    r.prompt.assign(4, 0);
    r.max_new_tokens = 4;
    for (int refusals = 0; refusals < kMostRefusals; ++refusals) {
      r.deadline = now_ + std::chrono::seconds(1);
      if (admission_.Admit(r, now_).ok()) {
        admission_.Ended(r, FinishReason::kCancelled, /*waiting=*/true);
        return;
      }
      now_ += std::chrono::seconds(10);
    }
    CHECK(false) << "an idle server refuses what it could finish in " << admission_.PredictMs(r) << " ms, as it thinks";
  }

  void Arrive() {
    Request r;
    const uint32_t kind = input_.Below(256);
    const int32_t length = 1 + static_cast<int32_t>(input_.Below(kContext));
    const auto family = static_cast<int32_t>(kind & 3);
    for (int32_t i = 0; i < length; ++i)
      r.prompt.push_back(i < 12 ? 100 * family + i : static_cast<int32_t>(input_.Below(2)));
    r.score = (kind & 0x1c) == 0 || length == kContext;
    const bool alone = length == kContext || (kind & 0x1d) == 0;
    r.max_new_tokens = alone ? 0 : 1 + static_cast<int32_t>(input_.Below(kContext - length));
    r.urgency = static_cast<Urgency>(input_.Below(3));
    r.priority = static_cast<int32_t>(input_.Below(3)) - 1;
    r.tenant = std::string(input_.Below(2), static_cast<char>('a' + input_.Below(3)));
    r.sparsity.tier = kAllTiers[input_.Below(5)];
    r.speculation.mode = static_cast<SpeculationMode>(input_.Below(3));
    r.speculation.draft_tier = kAllTiers[input_.Below(5)];
    r.speculation.most_tokens = 1 + static_cast<int32_t>(input_.Below(kMostDraftTokens));
    if ((kind & 0x20) != 0) r.deadline = now_ + AnyTime();
    if ((kind & 0x40) != 0) r.stop_at = now_ + AnyTime();
    if ((kind & 0x80) != 0) r.inter_token_target_ms = 1.0 + input_.Below(256);
    const int samples = 1 + static_cast<int>(input_.Below(3));

    Expectation expected;
    const absl::Status admitted = admission_.Admit(r, now_, &expected, samples);
    if (!admitted.ok()) return CheckRefusal(admitted);
    CHECK(std::isfinite(expected.first_token_ms) && expected.first_token_ms >= 0.0) << expected.first_token_ms;
    CHECK(std::isfinite(expected.token_ms) && expected.token_ms >= 0.0) << expected.token_ms;
    std::vector<BlockKey> keys;
    const bool cached = !r.score && family != 3;
    if (cached || samples > 1) {
      keys = BlockKeys(r.tenant, "", r.prompt, limits_.block_tokens, cached ? 0 : ++groups_);
    }
    for (int i = 0; i < samples; ++i) {
      auto s = std::make_unique<Sequence>(r, nullptr);
      s->id = next_id_++;
      s->arrival = now_;
      s->expected = expected;
      s->keys = keys;
      alive_.insert(s->id);
      scheduler_.Enqueue(std::move(s));
      r.score = false;  // the first alone tells of the prompt
    }
  }

  static void CheckRefusal(const absl::Status& status) {
    CheckAnswer(status, {absl::StatusCode::kResourceExhausted, absl::StatusCode::kDeadlineExceeded});
    const std::optional<RefusalInfo> info = RefusalOf(status);
    CHECK(info.has_value() && info->reason.has_value()) << status;
    const int64_t retry_ms = info->retry_after.count();
    CHECK(retry_ms >= 100 && retry_ms <= 30'000) << retry_ms << " ms";
  }

  // As StepEngine::Run does it.
  void Step() {
    EndOverdue();
    if (scheduler_.running().empty()) ahead_ = false;
    if (std::exchange(ahead_, false)) {
      scheduler_.TakeAhead();
      current_ = 1 - current_;
      CheckPlanned();
    } else if (!Plan()) {
      now_ += std::chrono::milliseconds(1);
      return;
    }
    const bool follow = (input_.Byte() & 1) != 0;
    if (follow) ahead_ = scheduler_.PlanAhead(batch(), batches_[1 - current_]);
    const double usual_ms = 1.0 + 0.1 * batch().rows();
    // One step in eight takes any time at all.
    const SteadyTime before = now_;
    now_ += input_.Below(8) == 7 ? AnyTime() : Lasting(usual_ms / 1000.0);
    std::vector<const Sequence*> done;
    for (const auto& s : scheduler_.running()) {
      if (s->step_rows > 0 && TakeResults(*s)) done.push_back(s.get());
    }
    scheduler_.NoteStep(Milliseconds(before, now_));
    for (const Sequence* s : done) End(*s, FinishReason::kLength);
    scheduler_.Inform(admission_);
  }

  // Whether `s` ends by what the step brings it.
  bool TakeResults(Sequence& s) {
    if (s.step_logits == 0) return false;
    if (s.step_use == Sequence::Use::kDraft) {
      const int32_t draft = Draw(s.first_logit);
      if (!s.round.drafting()) return false;
      s.round.drafts.push_back(draft);
      if (input_.Below(16) == 15) s.round.wanted = static_cast<int32_t>(s.round.drafts.size());
      return false;
    }
    if (!s.draws(s)) return s.computed + s.step_rows == s.prompt_tokens();
    bool more = true, ends = false;
    for (int32_t row = s.first_logit; more && !ends; ++row) {
      more = s.Take(Draw(row));
      ends = s.generated_tokens() == s.request.max_new_tokens || input_.Below(16) == 15;
    }
    CHECK(s.generated_tokens() <= s.request.max_new_tokens) << s.generated_tokens();
    return ends;
  }

  int32_t Draw(int32_t logit_row) { return drawn_[logit_row] = static_cast<int32_t>(input_.Below(2)); }

  // False where nobody has anything to do.
  bool Plan() {
    scheduler_.Plan(now_, batch());
    for (const Sequence* s : scheduler_.admitted()) admission_.Scheduled(s->request);
    for (const Sequence* s : scheduler_.preempted()) admission_.Requeued(s->request);
    scheduler_.Inform(admission_);
    CheckPlanned();
    return batch().rows() > 0;
  }

  // Of a step that was planned ahead when the one before it has been noted: each row has the token of its place, by its
  // name or as what that one has drawn there.
  void CheckPlanned() {
    const Batch& b = batch();
    CHECK(b.rows() <= b.max_rows) << b.rows() << " rows";
    CHECK(static_cast<int32_t>(b.logit_rows.size()) <= b.max_logit_rows) << b.logit_rows.size();
    CHECK(static_cast<int32_t>(scheduler_.running().size()) <= limits_.scheduler.max_batch) << "too many run";
    for (const auto& s : scheduler_.running()) {
      CHECK(static_cast<int32_t>(s->blocks.size()) <= b.blocks_per_slot) << s->blocks.size() << " blocks";
      for (size_t i = 0; i < s->blocks.size(); ++i) {
        const int32_t in_table = b.block_table[s->slot * b.blocks_per_slot + static_cast<int32_t>(i)];
        CHECK(in_table == s->blocks[i]) << "block " << i << " of slot " << s->slot;
      }
      std::vector<int32_t> tokens = s->tokens;
      if (s->round.open()) tokens.insert(tokens.end(), s->round.drafts.begin(), s->round.drafts.end());
      const bool drafts = s->step_use == Sequence::Use::kDraft;
      const int32_t first = s->computed + (drafts ? s->step_after - s->generated_tokens() : 0);
      CHECK(first + s->step_rows <= static_cast<int64_t>(s->blocks.size()) * limits_.block_tokens) << s->computed;
      for (int32_t i = 0; i < s->step_rows; ++i) {
        const int32_t position = b.positions[s->first_row + i], token = b.tokens[s->first_row + i];
        CHECK(position == first + i) << position << " in the place of " << first + i;
        if (position >= static_cast<int32_t>(tokens.size())) continue;  // behind a draft that is not drafted on
        const int32_t found = token >= 0 ? token : drawn_[DrawnId(token)];
        CHECK(found == tokens[position]) << "at " << position << " of " << tokens.size();
      }
    }
  }

  void EndSome(FinishReason reason) {
    std::vector<const Sequence*> all;
    for (const auto* sequences : {&scheduler_.running(), &scheduler_.waiting()}) {
      for (const auto& s : *sequences) all.push_back(s.get());
    }
    if (!all.empty()) End(*all[input_.Below(static_cast<uint32_t>(all.size()))], reason);
  }

  void EndWaiting() {
    std::vector<const Sequence*> all;
    for (const auto& s : scheduler_.waiting()) {
      if (s->preemptions == 0) all.push_back(s.get());
    }
    for (const Sequence* s : all) End(*s, FinishReason::kError);
  }

  void EndOverdue() {
    std::vector<std::pair<const Sequence*, FinishReason>> overdue;
    scheduler_.ForEachOverdue(now_, [&](const Sequence& s, FinishReason reason) { overdue.emplace_back(&s, reason); });
    for (const auto& [s, reason] : overdue) End(*s, reason);
  }

  // As StepEngine::End and Inbox::NoteEnd do it.
  void End(const Sequence& sequence, FinishReason reason) {
    const bool waiting = sequence.slot < 0;
    const std::unique_ptr<Sequence> s = scheduler_.Remove(sequence);
    CHECK(alive_.erase(s->id) == 1) << s->id << " ended twice";
    admission_.Ended(s->request, reason, waiting);
    if (reason != FinishReason::kCancelled && reason != FinishReason::kError) {
      admission_.NoteOutcome(s->expected, Milliseconds(s->arrival, now_), s->generated_tokens());
    }
    scheduler_.Inform(admission_);
  }

  void Check() {
    const Account& a = admission_.account();
    CHECK(a.received == a.finished + a.refused_total() + a.cancelled + a.failed + a.live) << a.received << " came";
    CHECK(a.live == static_cast<int64_t>(alive_.size())) << a.live << " live";
    CHECK(alive_.size() == scheduler_.running().size() + scheduler_.waiting().size()) << alive_.size() << " live";
    CHECK(admission_.waiting() == static_cast<int64_t>(scheduler_.waiting().size())) << admission_.waiting() << " wait";
    std::set<int32_t> used;
    for (const auto& s : scheduler_.running()) used.insert(s->blocks.begin(), s->blocks.end());
    CHECK(static_cast<int32_t>(used.size()) == pool_.total() - pool_.free()) << used.size() << " blocks are in use";
    if (events_++ % 8 == 0) pool_.CheckConsistent();
    const CostParameters costs = scheduler_.costs().parameters();
    for (const double ms : {costs.dense_ms, costs.exact_ms, costs.predicted_ms, costs.row_ms, costs.prefill_token_ms}) {
      CHECK(std::isfinite(ms) && ms >= 0.0) << ms;
    }
  }

  const WorldLimits limits_;
  FuzzInput& input_;
  BlockPool pool_;
  Scheduler scheduler_;
  Admission admission_;
  std::array<Batch, 2> batches_;
  size_t current_ = 0;
  std::vector<int32_t> drawn_;  // [logit rows] of the last step
  SteadyTime now_;
  bool ahead_ = false;  // the step after the last one is planned already
  uint64_t next_id_ = 1, groups_ = 0, events_ = 0;
  std::set<uint64_t> alive_;
};

void Run(absl::string_view bytes) {
  FuzzInput input(bytes);
  const WorldLimits limits = LimitsOf(&input);
  World world(limits, &input);
  while (!input.empty()) world.Event();
  world.Finish();
}

}  // namespace

FuzzTarget SchedulerTarget() {
  // Any bytes are events; these begin with different limits.
  std::vector<std::string> seeds;
  uint32_t state = 12345;
  for (int i = 0; i < 8; ++i) {
    std::string seed;
    for (int j = 0; j < 100 + 50 * i; ++j)
      seed.push_back(static_cast<char>((state = state * 1664525 + 1013904223) >> 24));
    seeds.push_back(seed);
  }
  return {"scheduler",
          512,
          Run,
          std::move(seeds),
          {std::string(8, '\x0c'), std::string(4, '\x10'), "\x1a", "\x1b", "\x1c", "\x1f\xff\x20"}};
}

}  // namespace dejavu
