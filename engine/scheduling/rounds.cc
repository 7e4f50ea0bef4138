// AUTO's sum: a round of k drafts at odds a brings 1 + a + ... + a^k tokens (Leviathan et al., Fast Inference from
// Transformers via Speculative Decoding, arXiv 2211.17192, eq. 1), and takes k steps that draft and one that checks.
#include "engine/scheduling/rounds.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dejavu {
namespace {

// Before anything is known. Few enough that a tier which is no good is found out in a round or two.
constexpr double kRightAtFirst = 6.0, kWrongAtFirst = 1.0;
constexpr double kOwnPrior = 4.0;  // drafts that what is known of all counts for, against a sequence's own
constexpr double kOwnMemory = 0.95, kCommonMemory = 0.995;
// Where rounds do not pay: when one is tried, how long it is, and when it is, if drafts are as good as they may be.
constexpr int32_t kTrialEvery = 128, kSeldomTrial = 4096, kTrialDrafts = 2;
constexpr double kGoodOdds = 0.95;
constexpr int32_t kStepsInRounds = 64, kRest = 4;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double ExpectedTokens(double odds, int32_t drafts) {
  double tokens = 1.0;
  for (double all_right = odds; drafts > 0; --drafts, all_right *= odds) tokens += all_right;
  return tokens;
}

// Steps that make text with drafts in them and without, DENSE or not, and steps that draft.
size_t KindOf(const StepShape& shape) {
  if (shape.drafts) return 4;
  return (shape.check_rows > 0 ? 2 : 0) + (shape.tier == Tier::kDense ? 1 : 0);
}

double Or(double target_ms, double other_ms) { return target_ms > 0.0 ? target_ms : other_ms; }

}  // namespace

void LookUp(const std::vector<int32_t>& tokens, int32_t most, std::vector<int32_t>* drafts) {
  constexpr size_t kLongest = 4, kShortest = 2, kFarthest = 1024;
  drafts->clear();
  const size_t n = tokens.size();
  size_t best = kShortest - 1, from = 0;
  for (size_t end = n; end-- > kShortest && n - end < kFarthest && best < kLongest;) {
    size_t same = 0;
    while (same < kLongest && same < end && tokens[end - 1 - same] == tokens[n - 1 - same]) ++same;
    if (same > best) {
      best = same;
      from = end;
    }
  }
  if (from == 0) return;
  // What repeats itself goes on doing so.
  for (size_t i = 0; static_cast<int32_t>(i) < most; ++i) drafts->push_back(tokens[from + i % (n - from)]);
}

Rounds::Rounds(const SchedulerOptions& options) : options_(options), trial_every_(kTrialEvery) {
  candidates_.reserve(options.max_batch);
  tier_odds_.fill({kRightAtFirst, kWrongAtFirst});
  lookup_odds_ = {kRightAtFirst, kWrongAtFirst};
}

void Rounds::Ratios::Note(int32_t rows, double ratio) {
  constexpr double kNew = 0.1, kMost = 2.0;
  double& known = of_rows[std::min(rows, kMostRows)];
  known = known == 0.0 ? ratio : known + kNew * (std::min(ratio, kMost * known) - known);
}

double Rounds::Ratios::At(int32_t rows) const {
  rows = std::min(rows, kMostRows);
  for (int32_t away = 0; away <= kMostRows; ++away) {
    for (const int32_t at : {rows - away, rows + away}) {
      if (0 < at && at <= kMostRows && of_rows[at] > 0.0) return of_rows[at];
    }
  }
  return 1.0;
}

double Rounds::StepMs(const CostModel& costs, const StepShape& shape) const {
  return costs.Predict(shape) * ratios_[KindOf(shape)].At(shape.decode_rows + shape.check_rows);
}

double Rounds::Odds(const Sequence& s, DraftSource source) const {
  const DraftOdds& own = s.odds[static_cast<size_t>(source)];
  const DraftOdds& all =
      source == DraftSource::kLookup ? lookup_odds_ : tier_odds_[static_cast<size_t>(s.request.speculation.draft_tier)];
  const double common = all.right / (all.right + all.wrong);
  return (kOwnPrior * common + own.right) / (kOwnPrior + own.right + own.wrong);
}

// The last token is drawn and never read: behind it nothing has a place.
int32_t Rounds::MostDrafts(const Sequence& s) const {
  return std::min(s.request.speculation.most_tokens, s.request.max_new_tokens - s.generated_tokens() - 1);
}

void Rounds::Open(const Running& running, const CostModel& costs, int32_t extra_rows,
                  absl::FunctionRef<int32_t(Sequence&, int32_t)> room) {
  bool any = false, waits = false;
  for (const auto& s : running) {
    any = any || (s->decodes() && s->speculates());
    waits = waits || !s->decodes();
  }
  if (!any) return;
  OpenAlways(running, &extra_rows, room);
  if (!waits) OpenAuto(running, costs, extra_rows, room);
}

void Rounds::OpenAlways(const Running& running, int32_t* extra_rows,
                        absl::FunctionRef<int32_t(Sequence&, int32_t)> room) {
  for (const auto& s : running) {
    const SpeculationParams& wanted = s->request.speculation;
    if (wanted.mode != SpeculationMode::kAlways || !s->speculates() || !s->decodes()) continue;
    int32_t most = std::min(MostDrafts(*s), *extra_rows);
    if (most > 0) most = room(*s, most);
    if (most <= 0) continue;
    DraftRound& round = s->round;
    if (wanted.lookup) LookUp(s->tokens, most, &round.drafts);
    const bool looked_up = !round.drafts.empty();
    if (looked_up && (!wanted.tier_drafts() || Odds(*s, DraftSource::kLookup) >= Odds(*s, DraftSource::kTier))) {
      round.source = DraftSource::kLookup;
      round.wanted = static_cast<int32_t>(round.drafts.size());
    } else if (wanted.tier_drafts()) {
      round.drafts.clear();
      round.source = DraftSource::kTier;
      round.wanted = most;
    }
    *extra_rows -= round.wanted;
  }
}

Rounds::Present Rounds::Look(const Running& running, const CostModel& costs) const {
  Present now;
  for (const auto& s : running) {
    ++now.rows;
    now.dense += s->request.sparsity.tier == Tier::kDense;
    now.context_tokens += s->computed;
  }
  const double plain_ms = StepMs(costs, {now.dense > 0 ? Tier::kDense : Tier::kExact, now.rows, 0, now.context_tokens});
  const double usual_ms = Or(options_.inter_token_target_ms, plain_ms * (1.0 + options_.prefill_share));
  now.wait_ms = now.burst_ms = kInfinity;
  for (const auto& s : running) {
    const double own_ms = Or(s->request.inter_token_target_ms, options_.inter_token_target_ms);
    now.wait_ms = std::min(now.wait_ms, Or(own_ms, usual_ms));
    now.burst_ms = std::min(now.burst_ms, Or(own_ms, kInfinity));
  }
  return now;
}

void Rounds::OpenAuto(const Running& running, const CostModel& costs, int32_t extra_rows,
                      absl::FunctionRef<int32_t(Sequence&, int32_t)> room) {
  if (rest_ > 0) {
    --rest_;
    ++idle_steps_;
    return;
  }
  candidates_.clear();
  for (const auto& s : running) {
    const SpeculationParams& wanted = s->request.speculation;
    if (s->round.open() || wanted.mode != SpeculationMode::kAuto || !s->speculates()) continue;
    const int32_t most = std::min(MostDrafts(*s), extra_rows);
    if (most <= 0) continue;
    if (wanted.lookup) LookUp(s->tokens, most, &s->round.drafts);
    candidates_.push_back({s.get(), most, wanted.tier_drafts() ? Odds(*s, DraftSource::kTier) : 0.0,
                           static_cast<int32_t>(s->round.drafts.size()), Odds(*s, DraftSource::kLookup)});
  }
  if (candidates_.empty() || !costs.learned()) {
    rest_ = kRest;
    return;
  }
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return a.tier_odds > b.tier_odds; });
  const Present now = Look(running, costs);
  // Now and then a step without drafts, which shows what they are held against.
  Plan best = steps_in_rounds_ < kStepsInRounds ? BestPlan(costs, now, extra_rows, 0.0) : Plan{};
  if (best.members > 0) {
    trial_every_ = kTrialEvery;
  } else if (idle_steps_ >= trial_every_) {
    best = BestPlan(costs, now, extra_rows, kGoodOdds);
    best.drafts = std::min(best.drafts, kTrialDrafts);
    trial_every_ = std::min(2 * trial_every_, kSeldomTrial);
    idle_steps_ = 0;
  }
  if (best.members == 0) {
    ++idle_steps_;
    rest_ = kRest;
  } else {
    idle_steps_ = 0;
  }
  for (size_t i = 0; i < candidates_.size(); ++i) {
    const Candidate& c = candidates_[i];
    DraftRound& round = c.sequence->round;
    const int32_t drafts = i >= best.members ? 0 : best.lookup ? c.lookup : std::min(best.drafts, c.most);
    const int32_t fit = drafts > 0 ? room(*c.sequence, drafts) : 0;
    round.drafts.resize(best.lookup ? fit : 0);
    round.source = best.lookup ? DraftSource::kLookup : DraftSource::kTier;
    round.wanted = fit;
  }
}

// Each number of members, those of the best odds first, with each number of drafts; or what can be looked up.
Rounds::Plan Rounds::BestPlan(const CostModel& costs, const Present& now, int32_t extra_rows, double least_odds) const {
  const StepShape plain{now.dense > 0 ? Tier::kDense : Tier::kExact, now.rows, 0, now.context_tokens};
  Plan best;
  best.rate = now.rows / StepMs(costs, plain) * (1.0 + options_.speculation_gain);
  const auto consider = [&](double tokens, double ms, const Plan& plan) {
    const bool all = static_cast<int32_t>(plan.members) == now.rows;
    if (ms > now.burst_ms || (!all && ms > now.wait_ms) || tokens / ms <= best.rate) return;
    best = plan;
    best.rate = tokens / ms;
  };
  StepShape check{plain.tier, now.rows, 0, now.context_tokens};
  double tokens = now.rows;
  for (size_t i = 0; i < candidates_.size() && check.check_rows + candidates_[i].lookup <= extra_rows; ++i) {
    if (candidates_[i].lookup == 0) continue;
    check.check_rows += candidates_[i].lookup;
    tokens += ExpectedTokens(candidates_[i].lookup_odds, candidates_[i].lookup) - 1.0;
    consider(tokens, StepMs(costs, check), {0.0, 0, i + 1, true});
  }
  int32_t most = 0;
  for (const Candidate& c : candidates_) most = std::max(most, c.most);
  for (int32_t k = 1; k <= most; ++k) {
    StepShape draft{Tier::kFast, 0, 0, now.context_tokens, 0, true};
    check = {Tier::kExact, now.rows, 0, now.context_tokens};
    int32_t dense = now.dense;
    tokens = now.rows;
    for (size_t i = 0; i < candidates_.size() && candidates_[i].tier_odds > 0.0; ++i) {
      const Candidate& c = candidates_[i];
      const int32_t drafts = std::min(k, c.most);
      if (check.check_rows + drafts > extra_rows) break;
      check.check_rows += drafts;
      dense -= c.sequence->request.sparsity.tier == Tier::kDense;
      check.tier = dense > 0 ? Tier::kDense : Tier::kExact;
      draft.tier = std::min(draft.tier, c.sequence->request.speculation.draft_tier);
      ++draft.decode_rows;
      tokens += ExpectedTokens(std::max(c.tier_odds, least_odds), drafts) - 1.0;
      consider(tokens, k * StepMs(costs, draft) + StepMs(costs, check), {0.0, k, i + 1, false});
    }
  }
  return best;
}

void Rounds::CutShort(const Running& running) {
  for (const auto& s : running) {
    if (s->round.open() && s->request.speculation.mode == SpeculationMode::kAuto) {
      s->round.wanted = static_cast<int32_t>(s->round.drafts.size());
    }
  }
}

bool Rounds::MayOpen(const Running& running) {
  bool may = false, always = false;
  for (const auto& s : running) {
    may = may || s->speculates();
    always = always || (s->speculates() && s->request.speculation.mode == SpeculationMode::kAlways);
  }
  if (!may || always || rest_ == 0) return may;
  --rest_;
  ++idle_steps_;
  return false;
}

void Rounds::NoteStep(const StepShape& shape, double ms, const StepYield& yield, const CostModel& costs) {
  if (shape.prefill_rows == 0 && shape.decode_rows > 0) {
    const double predicted_ms = costs.Predict(shape);
    if (predicted_ms > 0.0) {
      ratios_[KindOf(shape)].Note(shape.decode_rows + shape.check_rows, std::clamp(ms / predicted_ms, 0.1, 10.0));
    }
  }
  if (shape.drafts) {
    round_ms_ += ms;
  } else if (shape.check_rows > 0) {
    ++steps_in_rounds_;
    totals_.spent_ms += std::exchange(round_ms_, 0.0) + ms;
    const StepShape plain{yield.tier, shape.decode_rows, shape.prefill_rows, shape.context_tokens};
    totals_.plain_ms += StepMs(costs, plain) * yield.tokens / shape.decode_rows;
  } else {
    steps_in_rounds_ = 0;
    totals_.spent_ms += std::exchange(round_ms_, 0.0);  // whoever drafted has left
  }
}

void Rounds::Close(Sequence& s) {
  DraftRound& round = s.round;
  const auto source = static_cast<size_t>(round.source);
  const auto drafted = static_cast<int64_t>(round.drafts.size());
  const auto tier = static_cast<size_t>(s.request.speculation.draft_tier);
  const bool of_tier = round.source == DraftSource::kTier;
  s.odds[source].Add(round, kOwnMemory);
  (of_tier ? tier_odds_[tier] : lookup_odds_).Add(round, kCommonMemory);
  SpeculationReport& report = s.finish.speculation;
  if (of_tier) report.draft_tier = s.request.speculation.draft_tier;
  ++report.rounds;
  report.tokens += s.kept_rows;
  for (DraftCounts* counts : {&report.of_source[source], of_tier ? &totals_.of_tier[tier] : &totals_.lookup}) {
    counts->drafted += drafted;
    counts->accepted += round.accepted;
  }
  ++totals_.rounds;
  totals_.tokens += s.kept_rows;
  round.Close();
}

}  // namespace dejavu
