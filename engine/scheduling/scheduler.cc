#include "engine/scheduling/scheduler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/clock.h"

namespace dejavu {
namespace {

constexpr double kOutputCost = 2.0;    // of a generated token against one of a prompt, for fairness
constexpr size_t kManyTenants = 1024;  // then those without requests are forgotten
constexpr size_t kNobody = std::numeric_limits<size_t>::max();

int Index(Urgency urgency) { return static_cast<int>(urgency); }

// Of what is there or is being drafted. What the step that is being computed draws, the device has alone.
int32_t TokenAt(const Sequence& s, int32_t position) {
  const auto tokens = static_cast<int32_t>(s.tokens.size());
  if (position < tokens) return s.tokens[position];
  const auto draft = static_cast<size_t>(position - tokens);
  return s.round.open() && draft < s.round.drafts.size() ? s.round.drafts[draft] : DrawnId(s.first_logit);
}

TenantWeights WeightsIn(const SchedulerOptions& options) {
  absl::StatusOr<TenantWeights> weights = ParseTenantWeights(options.tenant_weights);
  CHECK(weights.ok()) << weights.status();
  return *std::move(weights);
}

}  // namespace

Scheduler::Scheduler(BlockPool& pool, const SchedulerOptions& options, CostModel costs)
    : pool_(pool), options_(options), weights_(WeightsIn(options)), costs_(std::move(costs)), rounds_(options) {
  for (int32_t slot = options.max_batch - 1; slot >= 0; --slot) free_slots_.push_back(slot);
  running_.reserve(options.max_batch);
  admitted_.reserve(options.max_batch);
  preempted_.reserve(options.max_batch);
}

void Scheduler::Enqueue(std::unique_ptr<Sequence> sequence) {
  Sequence& s = *sequence;
  CHECK(pool_.BlocksFor(s.max_positions()) <= pool_.total()) << s.max_positions() << " positions can never fit";
  s.turn = ++turns_;
  s.tenant = TenantOf(s);
  Tenant& tenant = tenants_[s.tenant];
  const int u = Index(s.request.urgency);
  // Who was idle starts level with the others: the past earns no credit.
  if (tenant.active[u] == 0) {
    double least = std::numeric_limits<double>::infinity();
    for (const Tenant& other : tenants_) {
      if (other.active[u] > 0) least = std::min(least, other.served[u]);
    }
    if (least < std::numeric_limits<double>::infinity()) tenant.served[u] = std::max(tenant.served[u], least);
  }
  ++tenant.live;
  ++tenant.active[u];
  waiting_.push_back(std::move(sequence));
  nothing_fits_ = false;
}

int32_t Scheduler::TenantOf(const Sequence& s) {
  const std::string& name = s.request.tenant;
  if (const auto known = tenant_ids_.find(name); known != tenant_ids_.end()) return known->second;
  if (tenant_ids_.size() >= kManyTenants) {
    for (size_t i = 0; i < tenants_.size(); ++i) {
      if (tenants_[i].live == 0) tenant_ids_.erase(tenants_[i].name);
    }
  }
  // The place of a forgotten one, or a new one.
  size_t place = 0;
  while (place < tenants_.size() && tenant_ids_.contains(tenants_[place].name)) ++place;
  if (place == tenants_.size()) tenants_.emplace_back();
  tenants_[place] = Tenant{};
  tenants_[place].name = name;
  for (const auto& [who, weight] : weights_) {
    if (who == name) tenants_[place].weight = weight;
  }
  tenant_ids_.emplace(name, static_cast<int32_t>(place));
  return static_cast<int32_t>(place);
}

void Scheduler::Charge(const Sequence& s, double tokens) {
  Tenant& tenant = tenants_[s.tenant];
  tenant.served[Index(s.request.urgency)] += tokens / tenant.weight;
}

double Scheduler::served(const std::string& tenant, Urgency urgency) const {
  const auto known = tenant_ids_.find(tenant);
  return known == tenant_ids_.end() ? 0.0 : tenants_[known->second].served[Index(urgency)];
}

void Scheduler::Plan(SteadyTime now, Batch& batch) {
  admitted_.clear();
  preempted_.clear();
  CountNotBatch(now);
  Admit(now, batch);
  batch.Clear();
  const bool drafted = std::exchange(shape_, StepShape{Tier::kFast, 0, 0, 0}).drafts;
  for (const auto& s : running_) static_cast<StepShare&>(*s) = {};
  if (options_.overcommit) GrowAll(batch);
  OpenRounds(drafted, batch);
  const Planning next{batch, shape_, /*ahead=*/false};
  if (PlanDrafts(next)) return;
  for (const auto& s : running_) {
    if (s->decodes()) AddDecodeRows(*s, next);
  }
  const StepShape decoding = shape_;
  int32_t score_rows_left = options_.score_rows - shape_.check_rows;
  for (int u = 0; u < kUrgencies; ++u) {
    const int32_t in_all = PrefillBudget(decoding, static_cast<Urgency>(u), batch.rows_left() + shape_.prefill_rows);
    int32_t budget = std::max(0, in_all - shape_.prefill_rows);  // the more urgent may have had more than this one may
    for (const auto& s : running_) {
      if (s->decodes() || Index(s->request.urgency) != u) continue;
      int32_t rows =
          std::min({s->prefill_tokens - s->computed, options_.prefill_chunk_tokens, batch.rows_left(), budget});
      if (s->scores()) {
        rows = std::min(rows, score_rows_left);
        score_rows_left -= rows;
      }
      if (rows <= 0) continue;
      AddRows(*s, rows, next);
      budget -= rows;
      shape_.prefill_rows += rows;
      shape_.tier = std::min({shape_.tier, s->request.sparsity.tier, Tier::kExact});
    }
  }
}

// Where all rounds have been checked the next ones begin. They leave a row for everyone who decodes, and logits. Where
// all that `drafted` in the last step have left, those who waited for them come first.
void Scheduler::OpenRounds(bool drafted, Batch& batch) {
  const bool open = std::any_of(running_.begin(), running_.end(), [](const auto& s) { return s->round.open(); });
  const bool waits = std::any_of(running_.begin(), running_.end(), [](const auto& s) { return !s->decodes(); });
  if (open || drafted) {
    if (waits) Rounds::CutShort(running_);
    return;
  }
  const int32_t extra = RowsForDrafts(batch);
  if (extra <= 0) return;
  rounds_.Open(running_, costs_, extra, [&](Sequence& s, int32_t drafts) { return RoomFor(s, drafts, batch); });
}

// Beside a row, and logits, for everyone who runs.
int32_t Scheduler::RowsForDrafts(const Batch& batch) const {
  const auto rows = static_cast<int32_t>(running_.size());
  return std::min({Rounds::kMostRows, batch.max_rows, options_.score_rows + rows}) - rows;
}

// Of so many drafts, for how many the sequence has blocks. What grows takes them from those that nobody will want in
// the next step; nobody goes for a draft.
int32_t Scheduler::RoomFor(Sequence& s, int32_t drafts, Batch& batch) {
  const auto growth =
      static_cast<int32_t>(std::count_if(running_.begin(), running_.end(), [&](const auto& r) { return Grows(*r); }));
  const auto has = [&] { return static_cast<int32_t>(s.blocks.size()) * pool_.block_tokens() - s.computed - 1; };
  int32_t block;
  while (has() < drafts && Grows(s) && pool_.free() > growth && pool_.Take(absl::MakeSpan(&block, 1))) {
    s.blocks.push_back(block);
    SetBlocks(s, batch);
  }
  return std::min(drafts, has());
}

// A row for the next draft of each sequence that drafts. False: none does.
bool Scheduler::PlanDrafts(const Planning& next) {
  for (const auto& s : running_) {
    const int32_t drafted = next.Drafted(*s);
    if (drafted >= s->round.wanted) continue;
    StepShare share;
    share.step_use = Sequence::Use::kDraft;
    share.step_rows = share.step_logits = 1;
    share.first_row = next.batch.rows();
    share.first_logit = static_cast<int32_t>(next.batch.logit_rows.size());
    share.step_after = s->generated_tokens() + drafted;
    SparsityParams sparse;
    sparse.tier = s->request.speculation.draft_tier;
    const int32_t position = s->computed + drafted;
    next.batch.AddDecodeRow(s->slot, position, TokenAt(*s, position), /*wants_logits=*/true, sparse);
    next.ShareOf(*s) = share;
    ++next.shape.decode_rows;
    next.shape.context_tokens += position;
    next.shape.tier = std::min(next.shape.tier, sparse.tier);
    next.shape.drafts = next.batch.drafts = true;
  }
  return next.shape.drafts;
}

bool Scheduler::PlanAhead(const Batch& batch, Batch& ahead) {
  const bool may_admit = !waiting_.empty() && !free_slots_.empty() && !nothing_fits_;
  if (may_admit || shape_.prefill_rows > 0 || shape_.check_rows > 0) return false;
  if (!shape_.drafts && !TextFollows(batch)) return false;
  ahead.Clear();
  ahead.block_table = batch.block_table;
  ahead_shape_ = {Tier::kFast, 0, 0, 0};
  for (const auto& s : running_) s->ahead = {};
  const Planning next{ahead, ahead_shape_, /*ahead=*/true};
  if (PlanDrafts(next)) return true;
  for (const auto& s : running_) {
    if (!s->decodes()) return false;
    AddDecodeRows(*s, next);
  }
  return ahead.rows() > 0;
}

// Whether all that run may have the next row of their text behind the one of the present step.
bool Scheduler::TextFollows(const Batch& batch) {
  if (batch.decode_rows != static_cast<int32_t>(running_.size())) return false;
  for (const auto& s : running_) {
    const bool room = pool_.BlocksFor(s->computed + 2) <= static_cast<int32_t>(s->blocks.size());
    if (s->step_rows != 1 || s->generated_tokens() + 1 >= s->request.max_new_tokens || !room) return false;
  }
  return RowsForDrafts(batch) <= 0 || !rounds_.MayOpen(running_);
}

void Scheduler::TakeAhead() {
  shape_ = ahead_shape_;
  for (const auto& s : running_) static_cast<StepShare&>(*s) = s->ahead;
}

// Of `all`, the prompt rows that leave the step within the target of the rows that decode and are as urgent. Where
// there are none, or nothing is known, nothing limits them.
int32_t Scheduler::PrefillBudget(const StepShape& decoding, Urgency urgency, int32_t all) const {
  if (!costs_.learned()) return all;
  const double without_ms = costs_.Predict(decoding);
  const double usual_ms = options_.inter_token_target_ms > 0.0 ? options_.inter_token_target_ms
                                                               : without_ms * (1.0 + options_.prefill_share);
  double target_ms = std::numeric_limits<double>::infinity();
  for (const auto& s : running_) {
    if (!s->decodes() || s->request.urgency > urgency) continue;
    const double own_ms = s->request.inter_token_target_ms;
    target_ms = std::min(target_ms, own_ms > 0.0 ? own_ms : usual_ms);
  }
  if (target_ms == std::numeric_limits<double>::infinity()) return all;
  // A prompt makes the others' tier EXACT at best.
  StepShape with = decoding;
  with.tier = std::min(with.tier, Tier::kExact);
  const double left_ms = target_ms - costs_.Predict(with);
  const double per_token_ms = costs_.parameters().prefill_token_ms;
  const double rows = per_token_ms > 0.0 ? left_ms / per_token_ms : all;
  return static_cast<int32_t>(std::clamp<double>(rows, std::min(all, options_.least_prefill_tokens), all));
}

// How many at once, lately, were not BATCH: so many slots are kept for them.
void Scheduler::CountNotBatch(SteadyTime now) {
  constexpr double kMemoryS = 30.0;
  const double passed_s = Seconds(not_batch_counted_, now);
  not_batch_counted_ = now;
  int32_t not_batch = 0;
  for (const Tenant& tenant : tenants_) not_batch += tenant.active[0] + tenant.active[1];
  recent_not_batch_ = std::max<double>(not_batch, recent_not_batch_ * std::exp(-std::max(0.0, passed_s) / kMemoryS));
}

void Scheduler::Admit(SteadyTime now, Batch& batch) {
  while (!waiting_.empty() && !free_slots_.empty() && !nothing_fits_) {
    bool aged = false;
    const size_t next = NextToAdmit(now, &aged);
    if (next == kNobody) return;
    Sequence& s = *waiting_[next];
    if (!TakeBlocks(s)) {
      nothing_fits_ = true;
      return;
    }
    since_aged_admission_ = aged ? 0 : since_aged_admission_ + 1;
    s.slot = free_slots_.back();
    free_slots_.pop_back();
    s.admission = ++admissions_;
    ++running_of_[Index(s.request.urgency)];
    SetBlocks(s, batch);
    admitted_.push_back(&s);
    running_.push_back(std::move(waiting_[next]));
    waiting_.erase(waiting_.begin() + static_cast<ptrdiff_t>(next));
  }
}

// Of the tiers that run, the one that reads most. While nothing runs, no tier costs others anything.
Tier Scheduler::CostliestRunningTier() const {
  if (running_.empty()) return Tier::kDense;
  Tier costliest = Tier::kFast;
  for (const auto& s : running_) costliest = std::min(costliest, s->request.sparsity.tier);
  return costliest;
}

// The place in waiting_ of the sequence that is admitted next, or kNobody.
size_t Scheduler::NextToAdmit(SteadyTime now, bool* aged) const {
  const Tier costliest = CostliestRunningTier();
  const auto old = now - Lasting(options_.ageing_s);
  size_t best = kNobody, oldest = kNobody;
  for (size_t i = 0; i < waiting_.size(); ++i) {
    const Sequence& s = *waiting_[i];
    if (!MayRun(s)) continue;
    if (best == kNobody || Before(s, *waiting_[best], costliest)) best = i;
    if (s.arrival <= old && (oldest == kNobody || s.turn < waiting_[oldest]->turn)) oldest = i;
  }
  *aged = oldest != kNobody && (oldest == best || since_aged_admission_ + 1 >= kAgedTurn);
  return *aged ? oldest : best;
}

// Whether `a` is admitted before `b`, while tiers up to `costliest` run.
bool Scheduler::Before(const Sequence& a, const Sequence& b, Tier costliest) const {
  if (a.request.urgency != b.request.urgency) return a.request.urgency < b.request.urgency;
  if (a.tenant != b.tenant) {
    const int u = Index(a.request.urgency);
    const double of_a = tenants_[a.tenant].served[u], of_b = tenants_[b.tenant].served[u];
    if (of_a != of_b) return of_a < of_b;
    return a.turn < b.turn;
  }
  // A sequence that reads no more than the others read already costs them nothing.
  const auto costs_others = [&](const Sequence& s) { return s.request.sparsity.tier < costliest; };
  return std::make_tuple(-int64_t{a.request.priority}, a.request.deadline, costs_others(a), a.turn) <
         std::make_tuple(-int64_t{b.request.priority}, b.request.deadline, costs_others(b), b.turn);
}

bool Scheduler::MayRun(const Sequence& s) const {
  if (s.request.urgency == Urgency::kBatch) {
    const int32_t reserved = std::clamp(static_cast<int32_t>(std::ceil(recent_not_batch_)) + 1, options_.max_batch / 4,
                                        options_.max_batch * 3 / 4);
    if (running_of_[Index(Urgency::kBatch)] >= options_.max_batch - reserved) return false;
  }
  // The first block that nobody has computed: somebody as urgent may be about to.
  const size_t sharable = Sharable(s);
  size_t known = 0;
  while (known < sharable && pool_.Known(s.keys[known])) ++known;
  const int32_t promised = known < sharable ? pool_.Promised(s.keys[known]) : -1;
  if (promised < 0) return true;
  return std::none_of(running_.begin(), running_.end(), [&](const auto& r) {
    return r->request.urgency <= s.request.urgency &&
           std::find(r->blocks.begin(), r->blocks.end(), promised) != r->blocks.end();
  });
}

// Blocks of its prompt that others may have computed. The last token is always computed anew: its logits are wanted. To
// score, those of all tokens are.
size_t Scheduler::Sharable(const Sequence& s) const {
  if (s.request.score) return 0;
  return std::min<size_t>(s.keys.size(), (s.prompt_tokens() - 1) / pool_.block_tokens());
}

// Whether it takes blocks as it grows, and may be sent back where none is left. Computed again, what a deterministic
// one of a predicted tier has generated would get other keys and values, and a score would be told twice.
bool Scheduler::Grows(const Sequence& s) const {
  const SparsityParams& sparsity = s.request.sparsity;
  return options_.overcommit && !s.request.score && !(sparsity.deterministic && IsPredicted(sparsity.tier));
}

bool Scheduler::TakeBlocks(Sequence& s) {
  const int32_t tokens = static_cast<int32_t>(s.tokens.size());
  // A prompt may fill the context: there is no place for a token behind it.
  const int64_t most = s.max_positions();
  const int32_t wanted = pool_.BlocksFor(Grows(s) ? std::min(tokens + int64_t{1}, most) : most);
  const size_t sharable = Sharable(s);
  // What runs will want to grow before this one has to go again.
  const auto growth =
      static_cast<int32_t>(std::count_if(running_.begin(), running_.end(), [&](const auto& r) { return Grows(*r); }));
  s.blocks.resize(wanted);
  const int32_t shared = pool_.Share(absl::MakeSpan(s.keys).first(sharable), absl::MakeSpan(s.blocks));
  if (pool_.free() < wanted - shared + growth || !pool_.Take(absl::MakeSpan(s.blocks).subspan(shared))) {
    pool_.Give(absl::MakeSpan(s.blocks).first(shared));
    s.blocks.clear();
    return false;
  }
  for (size_t i = shared; i < s.keys.size(); ++i) pool_.Promise(s.keys[i], s.blocks[i]);
  s.finish.saturated_kv_values = 0;
  for (int32_t i = 0; i < shared; ++i) s.finish.saturated_kv_values += pool_.saturated(s.blocks[i]);
  s.kept_blocks = shared;
  s.computed = shared * pool_.block_tokens();
  s.prefill_tokens = tokens;
  s.finish.cached_prompt_tokens = std::max(s.finish.cached_prompt_tokens, s.computed);
  return true;
}

// A block for the next position of each sequence that decodes. Where none is left the youngest of the least urgent of
// those that grow goes, perhaps the one that asks.
void Scheduler::GrowAll(Batch& batch) {
  const auto order = [&](const Sequence& s) { return std::make_tuple(Grows(s), s.request.urgency, s.admission); };
  for (size_t i = 0; i < running_.size();) {
    Sequence& s = *running_[i];
    int32_t block;
    if (!s.decodes() || pool_.BlocksFor(s.computed + 1) <= static_cast<int32_t>(s.blocks.size())) {
      ++i;
    } else if (pool_.Take(absl::MakeSpan(&block, 1))) {
      s.blocks.push_back(block);
      SetBlocks(s, batch);
      ++i;
    } else {
      const auto least = std::max_element(running_.begin(), running_.end(),
                                          [&](const auto& a, const auto& b) { return order(*a) < order(*b); });
      Preempt(**least);
      i = 0;  // places have changed; sequences that have their block keep it
    }
  }
}

// Back to the queue, where it keeps its turn.
void Scheduler::Preempt(Sequence& s) {
  const auto it = std::find_if(running_.begin(), running_.end(), [&](const auto& other) { return other.get() == &s; });
  std::unique_ptr<Sequence> moved = std::move(*it);
  running_.erase(it);
  Release(s);
  s.computed = 0;
  s.round.Close();
  ++s.preemptions;
  preempted_.push_back(&s);
  const auto place = std::upper_bound(waiting_.begin(), waiting_.end(), s.turn,
                                      [](uint64_t turn, const auto& other) { return turn < other->turn; });
  waiting_.insert(place, std::move(moved));
}

void Scheduler::SetBlocks(const Sequence& s, Batch& batch) const {
  std::copy(s.blocks.begin(), s.blocks.end(),
            batch.block_table.begin() + static_cast<ptrdiff_t>(s.slot) * batch.blocks_per_slot);
}

// The last token of a sequence that decodes, and the drafts that may follow it. A check of DENSE is as good in EXACT,
// and reads less.
void Scheduler::AddDecodeRows(Sequence& s, const Planning& next) {
  ++next.shape.decode_rows;
  next.shape.context_tokens += next.Computed(s);
  if (!s.round.open()) {
    AddRows(s, 1, next);
    next.shape.tier = std::min(next.shape.tier, s.request.sparsity.tier);
    return;
  }
  SparsityParams exact;
  exact.tier = Tier::kExact;
  next.shape.tier = std::min(next.shape.tier, exact.tier);
  const int32_t drafts = std::min(next.Drafted(s), s.round.wanted);
  StepShare share;
  share.step_use = Sequence::Use::kCheck;
  share.first_row = next.batch.rows();
  share.first_logit = static_cast<int32_t>(next.batch.logit_rows.size());
  share.step_after = s.generated_tokens();
  share.step_rows = share.step_logits = 1 + drafts;
  for (int32_t position = s.computed; position <= s.computed + drafts; ++position) {
    next.batch.AddDecodeRow(s.slot, position, TokenAt(s, position), /*wants_logits=*/true, exact);
  }
  next.shape.check_rows += drafts;
  next.ShareOf(s) = share;
}

// The next `rows` uncomputed tokens of the sequence. Logits are wanted after its last token, or, to score its prompt,
// after each.
void Scheduler::AddRows(Sequence& s, int32_t rows, const Planning& next) {
  Batch& batch = next.batch;
  const int32_t first = next.Computed(s), more = first - s.computed;
  const int32_t tokens = static_cast<int32_t>(s.tokens.size()) + more;
  StepShare share;
  share.step_rows = share.kept_rows = rows;
  share.first_row = batch.rows();
  share.first_logit = static_cast<int32_t>(batch.logit_rows.size());
  share.step_after = s.generated_tokens() + more;
  for (int32_t position = first; position < first + rows; ++position) {
    const bool wants_logits = position + 1 == tokens || s.scores();
    const int32_t token = TokenAt(s, position);
    if (s.decodes()) {
      batch.AddDecodeRow(s.slot, position, token, wants_logits, s.request.sparsity);
    } else {
      batch.AddRow(s.slot, position, token, wants_logits, std::min(s.request.sparsity.tier, Tier::kExact));
    }
    share.step_logits += wants_logits;
  }
  next.ShareOf(s) = share;
}

int64_t Scheduler::NoteSaturated(const std::vector<int32_t>& of_rows) {
  int64_t all = 0;
  for (const auto& s : running_) {
    for (int32_t i = 0; s->step_rows > 0 && i < s->kept_rows; ++i) {
      const int32_t count = of_rows[s->first_row + i];
      if (count == 0) continue;
      all += count;
      s->finish.saturated_kv_values += count;
      pool_.NoteSaturated(s->blocks[(s->computed + i) / pool_.block_tokens()], count);
    }
  }
  return all;
}

void Scheduler::NoteStep(double ms) {
  if (shape_.decode_rows + shape_.prefill_rows > 0) {
    costs_.Observe(shape_, ms);
    Rounds::StepYield yield;
    for (const auto& s : running_) {
      if (s->step_rows == 0 || !s->decodes()) continue;
      yield.tokens += s->kept_rows;
      yield.tier = std::min(yield.tier, s->request.sparsity.tier);
    }
    rounds_.NoteStep(shape_, ms, yield, costs_);
  }
  for (const auto& s : running_) {
    if (s->step_rows == 0) continue;
    // Work: a draft is a row as one of a prompt is, and so is its check.
    const bool gives = s->decodes() && s->step_use != Sequence::Use::kDraft;
    Charge(*s, gives ? kOutputCost + s->step_rows - 1 : s->step_rows);
    s->computed += s->kept_rows;
    if (s->step_use == Sequence::Use::kCheck) rounds_.Close(*s);
    const auto full = std::min<int32_t>(static_cast<int32_t>(s->keys.size()), s->computed / pool_.block_tokens());
    if (full > s->kept_blocks) nothing_fits_ = false;  // who waited for this prefix may go on
    for (; s->kept_blocks < full; ++s->kept_blocks) pool_.Keep(s->blocks[s->kept_blocks]);
  }
}

double Scheduler::LongestStepMs() const {
  const int64_t context_tokens = int64_t{pool_.total()} * pool_.block_tokens();
  return costs_.Predict(
      {Tier::kDense, options_.max_batch, options_.max_step_tokens - options_.max_batch, context_tokens});
}

void Scheduler::Inform(Admission& admission) const {
  Admission::Load load{.costs = costs_.parameters(),
                       .learned = costs_.learned(),
                       .learned_predicted = costs_.has_run(Tier::kFast),
                       .best_share = costs_.best_share(),
                       .running = static_cast<int32_t>(running_.size()),
                       .first_free_steps = running_.empty() ? 0 : std::numeric_limits<int64_t>::max()};
  for (const auto& s : running_) {
    load.costliest_tier = std::min(load.costliest_tier, s->request.sparsity.tier);
    load.first_free_steps = std::min<int64_t>(load.first_free_steps, s->request.max_new_tokens - s->generated_tokens());
  }
  admission.SetLoad(load);
}

// A prefix may have been computed in part; what is not is withdrawn by the pool.
void Scheduler::Release(Sequence& s) {
  free_slots_.push_back(s.slot);
  s.slot = -1;
  pool_.Give(s.blocks);
  s.blocks.clear();
  --running_of_[Index(s.request.urgency)];
  nothing_fits_ = false;
}

std::unique_ptr<Sequence> Scheduler::Remove(const Sequence& sequence) {
  const auto is_it = [&](const std::unique_ptr<Sequence>& s) { return s.get() == &sequence; };
  std::unique_ptr<Sequence> removed;
  if (auto it = std::find_if(running_.begin(), running_.end(), is_it); it != running_.end()) {
    removed = std::move(*it);
    running_.erase(it);
    Release(*removed);
  } else {
    auto waiting = std::find_if(waiting_.begin(), waiting_.end(), is_it);
    CHECK(waiting != waiting_.end()) << "sequence " << sequence.id << " is not here";
    removed = std::move(*waiting);
    waiting_.erase(waiting);
    nothing_fits_ = false;
  }
  Tenant& tenant = tenants_[removed->tenant];
  --tenant.live;
  --tenant.active[Index(removed->request.urgency)];
  return removed;
}

}  // namespace dejavu
