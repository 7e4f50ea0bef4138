#include "tests/engine/serving/random_load.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <utility>

#include "gtest/gtest.h"
#include "tests/engine/serving/collecting_sink.h"
#include "tests/engine/serving/embedded_engine.h"

namespace dejavu {
namespace {

// With speculation as they ask for it or OFF.
std::vector<std::vector<Got>> Play(Engine& engine, const std::vector<Asked>& load, bool speculate, bool together) {
  std::optional<HeldEngine> held;
  if (together) held.emplace(engine);
  std::vector<std::vector<std::shared_ptr<TokenSink>>> sinks;
  for (const Asked& asked : load) {
    std::vector<std::shared_ptr<TokenSink>>& samples = sinks.emplace_back();
    const auto id = std::make_shared<std::atomic<uint64_t>>(0);
    for (int i = 0; i < asked.samples; ++i) {
      samples.push_back(std::make_shared<CollectingSink>([&engine, &asked, id, i](size_t count) {
        if (count == asked.cancelled_after && *id != 0) engine.Cancel(*id + i);
        return count != asked.leaves_after;
      }));
    }
    Request request = asked.request;
    if (!speculate) request.speculation.mode = SpeculationMode::kOff;
    if (asked.ends_after_ms > 0) {
      (asked.deadline ? request.deadline : request.stop_at) =
          std::chrono::steady_clock::now() + std::chrono::milliseconds(asked.ends_after_ms);
    }
    const auto submitted = engine.SubmitSamples(std::move(request), samples);
    EXPECT_TRUE(submitted.ok()) << submitted.status();
    if (submitted.ok()) *id = *submitted;
  }
  if (together) held->LetGo();
  std::vector<std::vector<Got>> got = WaitForAll(sinks);
  EXPECT_TRUE(engine.WaitIdle(SteadyTime::max()));
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.kv_blocks_free, stats.kv_blocks_total);
  const Account& a = stats.account;
  EXPECT_EQ(a.received, a.finished + a.refused_total() + a.cancelled + a.failed + a.live);
  EXPECT_EQ(a.live, 0);
  return got;
}

// Those that were cut off have got what they would have, as far as they came.
void ExpectSame(const Asked& asked, const Got& got, const Got& want) {
  const auto cut_off = [](const Got& end) {
    const FinishReason reason = end.finish.reason;
    return reason == FinishReason::kCancelled || reason == FinishReason::kDeadline || reason == FinishReason::kTime;
  };
  if (!cut_off(got) && !cut_off(want)) {
    EXPECT_EQ(got.finish.reason, want.finish.reason);
    EXPECT_EQ(got.finish.status, want.finish.status);
    EXPECT_EQ(got.finish.stop_token_id, want.finish.stop_token_id);
    EXPECT_EQ(got.finish.generated_tokens, want.finish.generated_tokens);
    EXPECT_EQ(got.finish.saturated_kv_values, want.finish.saturated_kv_values);
    ASSERT_EQ(got.tokens.size(), want.tokens.size());
  } else {
    ASSERT_TRUE(asked.cancelled_after > 0 || asked.ends_after_ms > 0);
  }
  for (size_t i = 0; i < std::min(got.tokens.size(), want.tokens.size()); ++i) {
    SCOPED_TRACE(testing::Message() << "token " << i);
    ExpectSameToken(got.tokens[i], want.tokens[i]);
  }
  const SpeculationReport& report = got.finish.speculation;
  int64_t accepted = 0;
  for (const DraftCounts& counts : report.of_source) {
    EXPECT_LE(counts.accepted, counts.drafted);
    accepted += counts.accepted;
  }
  EXPECT_LE(report.tokens, got.finish.generated_tokens);
  EXPECT_LE(accepted, report.tokens);
  EXPECT_LE(report.tokens, accepted + report.rounds);
  EXPECT_EQ(want.finish.speculation.rounds, 0);
}

}  // namespace

std::vector<Asked> RandomLoad::Draw(int requests) {
  std::vector<Asked> load(requests);
  for (Asked& asked : load) asked = DrawOne();
  return load;
}

Asked RandomLoad::DrawOne() {
  Asked asked;
  std::vector<int32_t> prompt = {2};
  const int family = Below(3), length = 1 + Below(24);
  for (int i = 1; i < length; ++i) {
    const int shared = 4 + (6 + 20 * family + i) % (sizes_.vocabulary - 4);
    prompt.push_back(i < 12 ? shared : OneIn(2) ? 4 + Below(8) : AnyToken());
  }
  const Tier tier = OneIn(6) ? kAllTiers[Below(5)] : kAllTiers[Below(2)];
  const bool score = OneIn(12);
  Request& r = asked.request;
  const int room = sizes_.context - length;
  const int most = OneIn(3) ? room : std::min(24, room);
  r = SparseRequest(prompt, score && OneIn(2) ? 0 : 1 + Below(most), {tier, OneIn(2), 0});
  r.score = score;
  r.urgency = static_cast<Urgency>(Below(3));
  r.logprobs = true;
  r.top_logprobs = OneIn(3) ? Below(4) : OneIn(10) ? std::min(200, sizes_.vocabulary) : 0;
  r.ignore_eos = OneIn(2);
  if (r.max_new_tokens == 0) return asked;
  if (!OneIn(3)) {
    r.sampling.temperature = 0.3f + 0.1f * static_cast<float>(Below(13));
    asked.samples = OneIn(6) ? 1 + Below(3) : 1;
  }
  r.sampling.seed = static_cast<uint64_t>(Below(1000));
  if (OneIn(4)) r.sampling.top_k = 1 + Below(40);
  if (OneIn(4)) r.sampling.top_p = 0.5f + 0.05f * static_cast<float>(Below(10));
  if (OneIn(5)) r.sampling.repetition_penalty = 1.3f;
  if (OneIn(5)) r.sampling.presence_penalty = 0.7f;
  if (OneIn(6)) r.sampling.frequency_penalty = 0.4f;
  if (OneIn(6)) r.sampling.logit_bias = {{AnyToken(), 2.0f}, {AnyToken(), -5.0f}};
  if (OneIn(12)) {
    for (int i = 0; i < 20; ++i) r.sampling.allowed_token_ids.push_back(4 + i * (sizes_.vocabulary - 4) / 21);
  }
  for (int i = Below(3) * 4; i > 0; --i) r.stop_token_ids.push_back(AnyToken());
  if (OneIn(4)) r.min_new_tokens = Below(r.max_new_tokens + 1);
  if (OneIn(6)) asked.leaves_after = static_cast<size_t>(1 + Below(10));
  if (OneIn(10)) asked.cancelled_after = static_cast<size_t>(1 + Below(10));
  if (OneIn(10)) asked.ends_after_ms = 1 + Below(200);
  asked.deadline = OneIn(2);
  SpeculationParams& s = r.speculation;
  s.mode = OneIn(6) ? SpeculationMode::kOff : OneIn(4) ? SpeculationMode::kAuto : SpeculationMode::kAlways;
  s.draft_tier = OneIn(4) ? Tier::kDense : kPredictedTiers[Below(3)];
  s.lookup = !s.tier_drafts() || OneIn(2);
  s.most_tokens = 1 + Below(8);
  return asked;
}

Drafted ExpectSameWithSpeculation(Engine& engine, const std::vector<Asked>& load, bool together) {
  Drafted all;
  const auto want = Play(engine, load, /*speculate=*/false, together);
  const auto got = Play(engine, load, /*speculate=*/true, together);
  for (size_t i = 0; i < load.size() && !testing::Test::HasFailure(); ++i) {
    SCOPED_TRACE(testing::Message() << "request " << i << ", " << Name(load[i].request.sparsity.tier));
    for (int s = 0; s < load[i].samples; ++s) {
      const SpeculationReport& report = got[i][s].finish.speculation;
      all.rounds += report.rounds;
      for (const DraftCounts& counts : report.of_source) {
        all.drafted += counts.drafted;
        all.accepted += counts.accepted;
      }
      if (load[i].promised()) ExpectSame(load[i], got[i][s], want[i][s]);
    }
  }
  return all;
}

}  // namespace dejavu
