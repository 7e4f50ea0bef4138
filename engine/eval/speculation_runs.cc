#include "engine/eval/speculation_runs.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/clock.h"
#include "kernels/base/mutex.h"
#include "kernels/base/status_macros.h"

namespace dejavu {
namespace {

class EndSink final : public TokenSink {
 public:
  bool OnToken(const Token&) override { return true; }
  bool OnPromptToken(const Token&) override { return true; }
  void OnFinish(const Finish& finish) override {
    MutexLock lock(mutex_);
    finish_ = finish;
    ended_.NotifyAll();
  }

  Finish Wait() {
    MutexLock lock(mutex_);
    while (!finish_.has_value()) ended_.Wait(mutex_);
    return *finish_;
  }

 private:
  Mutex mutex_;
  CondVar ended_;
  std::optional<Finish> finish_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

std::string SpeculationWay::Name() const {
  const SpeculationParams& s = speculation;
  const std::string of(dejavu::Name(tier));
  if (s.mode != SpeculationMode::kAlways) return absl::StrCat(of, " ", dejavu::Name(s.mode));
  return absl::StrCat(of, " ", s.lookup ? "lookup" : dejavu::Name(s.draft_tier), " ", s.most_tokens);
}

SpeculationYield& SpeculationYield::operator+=(const SpeculationYield& other) {
  seconds += other.seconds;
  new_tokens += other.new_tokens;
  rounds += other.rounds;
  tokens += other.tokens;
  drafted += other.drafted;
  accepted += other.accepted;
  return *this;
}

absl::StatusOr<std::vector<SpeculationWay>> ListWays(const SpeculationWays& wanted, const Engine& engine) {
  std::vector<SpeculationWay> ways;
  const auto add = [&](Tier tier, SpeculationMode mode, Tier draft, bool lookup, int most) {
    ways.push_back({tier, {mode, draft, lookup, most}});
  };
  const std::vector<Tier>& there = engine.predictor().tiers;
  const std::vector<Tier>& drafting = wanted.drafting.empty() ? there : wanted.drafting;
  for (const Tier tier : drafting) {
    if (std::count(there.begin(), there.end(), tier) > 0) continue;
    const auto append = [](std::string* out, Tier each) { absl::StrAppend(out, Name(each)); };
    return absl::FailedPreconditionError(
        absl::StrCat("tier ", Name(tier), " cannot draft; those that can: ",
                     there.empty() ? "none, as there is no predictor" : absl::StrJoin(there, ", ", append)));
  }
  const SpeculationParams defaults;
  const Tier usual = drafting.empty() ? Tier::kDense : drafting.front();
  for (const Tier tier : {Tier::kDense, Tier::kExact}) {
    add(tier, SpeculationMode::kOff, usual, false, defaults.most_tokens);
    add(tier, SpeculationMode::kAuto, usual, true, defaults.most_tokens);
    if (wanted.auto_alone) continue;
    for (const int most : wanted.drafts) {
      for (const Tier draft : drafting) add(tier, SpeculationMode::kAlways, draft, false, most);
      add(tier, SpeculationMode::kAlways, Tier::kDense, true, most);
    }
  }
  return ways;
}

absl::StatusOr<SpeculationYield> RunWay(Engine& engine, absl::Span<const std::vector<int32_t>> prompts, int new_tokens,
                                        float temperature, const SpeculationWay& way) {
  std::vector<std::shared_ptr<EndSink>> sinks;
  for (const std::vector<int32_t>& prompt : prompts) {
    Request request;
    request.prompt = prompt;
    request.max_new_tokens = new_tokens;
    request.ignore_eos = true;
    request.sampling.temperature = temperature;
    request.sampling.seed = sinks.size();
    request.sparsity.tier = way.tier;
    request.speculation = way.speculation;
    sinks.push_back(std::make_shared<EndSink>());
    RETURN_IF_ERROR(engine.Submit(std::move(request), sinks.back()).status());
  }
  SpeculationYield yield;
  SteadyTime first, last;
  for (const auto& sink : sinks) {
    const Finish finish = sink->Wait();
    RETURN_IF_ERROR(finish.status);
    first = std::max(first, finish.first_token);
    last = std::max(last, finish.finished);
    yield.rounds += finish.speculation.rounds;
    yield.tokens += finish.speculation.tokens;
    for (const DraftCounts& counts : finish.speculation.of_source) {
      yield.drafted += counts.drafted;
      yield.accepted += counts.accepted;
    }
  }
  // Prompts end in steps of their own, one after the other; what the early ones have got by then is little.
  yield.seconds = Seconds(first, last);
  yield.new_tokens = static_cast<int64_t>(prompts.size()) * (new_tokens - 1);
  return yield;
}

}  // namespace dejavu
