// Speculation changes no token, no log-probability and no reason to end, bit by bit: random loads with it and without,
// through the engine's public interface.
#include <algorithm>
#include <bit>
#include <random>

#include "gtest/gtest.h"
#include "kernels/base/check.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/serving/embedded_engine.h"
#include "tests/highway_targets.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

constexpr char kModel[] = "pre-norm-hd128-sharded";
constexpr int kContext = 128;

struct Asked {
  Request request;
  int samples = 1;
  size_t leaves_after = 0;     // so many tokens, by what the sink says; 0: it stays to its end
  size_t cancelled_after = 0;  // by a call, whenever that is heard
  int ends_after_ms = 0;       // by a deadline, or with what it has
  bool deadline = false;

  // A prompt is the same in every tier.
  bool promised() const {
    return request.max_new_tokens == 0 || !IsPredicted(request.sparsity.tier) || request.sparsity.deterministic;
  }
};

class RandomLoad {
 public:
  explicit RandomLoad(uint32_t seed) : random_(seed) {}

  std::vector<Asked> Draw(int requests) {
    std::vector<Asked> load(requests);
    for (Asked& asked : load) asked = DrawOne();
    return load;
  }

 private:
  int Below(int below) { return std::uniform_int_distribution<int>(0, below - 1)(random_); }
  bool OneIn(int n) { return Below(n) == 0; }

  Asked DrawOne() {
    Asked asked;
    std::vector<int32_t> prompt = {2};
    const int family = Below(3), length = 1 + Below(24);
    for (int i = 1; i < length; ++i) prompt.push_back(i < 12 ? 10 + 20 * family + i : 4 + Below(OneIn(2) ? 8 : 500));
    const Tier tier = OneIn(6) ? kAllTiers[Below(5)] : kAllTiers[Below(2)];
    const bool score = OneIn(12);
    Request& r = asked.request;
    r = SparseRequest(prompt, score && OneIn(2) ? 0 : 1 + Below(OneIn(3) ? kContext - length : 24),
                      {tier, OneIn(2), 0});
    r.score = score;
    r.urgency = static_cast<Urgency>(Below(3));
    r.logprobs = true;
    r.top_logprobs = OneIn(3) ? Below(4) : OneIn(10) ? 200 : 0;
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
    if (OneIn(6)) r.sampling.logit_bias = {{4 + Below(500), 2.0f}, {4 + Below(500), -5.0f}};
    if (OneIn(12)) {
      for (int i = 0; i < 20; ++i) r.sampling.allowed_token_ids.push_back(4 + 7 * i);
    }
    for (int i = Below(3) * 4; i > 0; --i) r.stop_token_ids.push_back(4 + Below(500));
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

  std::mt19937 random_;
};

struct Got {
  std::vector<CollectingSink::HeardToken> tokens;
  Finish finish;
};

// All of them at once, with speculation as they ask for it or OFF.
std::vector<std::vector<Got>> Play(Engine& engine, const std::vector<Asked>& load, bool speculate) {
  HeldEngine held(engine);
  std::vector<std::vector<std::shared_ptr<TokenSink>>> sinks;
  for (const Asked& asked : load) {
    std::vector<std::shared_ptr<TokenSink>>& samples = sinks.emplace_back();
    const auto id = std::make_shared<std::atomic<uint64_t>>(0);
    for (int i = 0; i < asked.samples; ++i) {
      samples.push_back(std::make_shared<CollectingSink>([&engine, &asked, id, i](size_t count) {
        if (count == asked.cancelled_after) engine.Cancel(*id + i);
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
  held.LetGo();
  std::vector<std::vector<Got>> got;
  for (const auto& samples : sinks) {
    got.emplace_back();
    for (const auto& sink : samples) {
      auto& collecting = static_cast<CollectingSink&>(*sink);
      const Finish finish = collecting.WaitForFinish();
      got.back().push_back({collecting.tokens(), finish});
    }
  }
  EXPECT_TRUE(engine.WaitIdle(SteadyTime::max()));
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.kv_blocks_free, stats.kv_blocks_total);
  const Account& a = stats.account;
  EXPECT_EQ(a.received, a.finished + a.refused_total() + a.cancelled + a.failed + a.live);
  EXPECT_EQ(a.live, 0);
  return got;
}

void ExpectSameToken(const CollectingSink::HeardToken& got, const CollectingSink::HeardToken& want) {
  const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
  EXPECT_EQ(got.id, want.id);
  EXPECT_EQ(got.has_logprob, want.has_logprob);
  EXPECT_EQ(bits(got.logprob), bits(want.logprob));
  EXPECT_EQ(got.rank, want.rank);
  EXPECT_EQ(got.stop, want.stop);
  ASSERT_EQ(got.top.size(), want.top.size());
  for (size_t i = 0; i < got.top.size(); ++i) {
    EXPECT_EQ(got.top[i].id, want.top[i].id);
    EXPECT_EQ(bits(got.top[i].logprob), bits(want.top[i].logprob));
  }
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

struct World {
  int ranks = 1;
  bool overcommit = false;
  int max_batch = 8;
  int requests = 48;
  std::string weights = "stored", kv = "fp32";
};

// What drafts came to.
struct Drafted {
  int64_t rounds = 0, drafted = 0, accepted = 0;
};

class SpeculationTest : public testing::Test {
 protected:
  EngineOptions Options(const World& world) {
    EngineOptions options;
    options.model = CheckpointPath(kModel);
    options.predictor = directory_.Path("predictor.safetensors");
    if (predictor_.empty()) {
      const PredictorData data = MakePredictor(OptConfig::Load(options.model).value(), Tap::kAttentionNorm, 4);
      predictor_ = WritePredictorFor(options.model, data, options.predictor);
    }
    options.shadow_fallback = false;
    options.device = "cpu";
    options.threads = world.ranks;
    options.pin_threads = false;
    options.tensor_parallel = world.ranks;
    options.peer_timeout_s = 100.0;
    options.scheduler.max_batch = world.max_batch;
    options.scheduler.max_step_tokens = 40;
    options.scheduler.prefill_chunk_tokens = 5;
    options.scheduler.overcommit = world.overcommit;
    options.admission.max_waiting_requests = 1000;
    options.admission.deadline_slack = 0.0;
    options.kv.block_tokens = 4;
    options.kv.dtype = world.kv;
    options.weights = world.weights;
    if (world.overcommit) options.kv.memory_mib = 1;
    return options;
  }
  static std::unique_ptr<Engine> Make(const EngineOptions& options) {
    auto engine = Engine::Create(options, 0, nullptr);
    CHECK(engine.ok()) << engine.status().ToString();
    return *std::move(engine);
  }

  // Random requests, as many as the world has, with speculation and without.
  Drafted Compare(Engine& engine, const World& world) {
    Drafted all;
    const int part = 12 * world.max_batch;
    for (int first = 0; first < world.requests && !HasFailure(); first += part) {
      SCOPED_TRACE(testing::Message() << "from request " << first);
      const std::vector<Asked> load = RandomLoad(world.ranks * 1000 + first + world.overcommit + 7 * world.max_batch)
                                          .Draw(std::min(part, world.requests - first));
      const auto want = Play(engine, load, /*speculate=*/false);
      const auto got = Play(engine, load, /*speculate=*/true);
      for (size_t i = 0; i < load.size() && !HasFailure(); ++i) {
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
    }
    return all;
  }

  const ScratchDirectory directory_;
  std::string predictor_;
};

class Speculation : public SpeculationTest, public testing::WithParamInterface<World> {};

TEST_P(Speculation, GivesTheTokensOfTheSameRequestsWithout) {
  const World world = GetParam();
  const auto engine = Make(Options(world));
  const Drafted all = Compare(*engine, world);
  // Drafts were right, and wrong.
  EXPECT_GT(all.rounds, world.requests / 2);
  EXPECT_GT(all.accepted, world.requests / 4);
  EXPECT_GT(all.drafted - all.accepted, world.requests / 4);
  const SpeculationTotals totals = engine->stats().speculation;
  EXPECT_EQ(totals.rounds, all.rounds);
  DraftCounts of_all = totals.lookup;
  for (const DraftCounts& counts : totals.of_tier) {
    of_all.drafted += counts.drafted;
    of_all.accepted += counts.accepted;
  }
  EXPECT_EQ(of_all.drafted, all.drafted);
  EXPECT_EQ(of_all.accepted, all.accepted);
  if (world.overcommit) {
    EXPECT_GT(engine->stats().preemptions, 5);
  }
}

INSTANTIATE_TEST_SUITE_P(Worlds, Speculation,
                         testing::Values(World{1, false, 1, 60}, World{1, false, 4, 192}, World{1, false, 16, 384},
                                         World{1, true, 16, 192}, World{2, false, 8, 192}, World{3, true, 20, 100}),
                         [](const auto& info) {
                           const World& w = info.param;
                           return "Ranks" + std::to_string(w.ranks) + "Batch" + std::to_string(w.max_batch) +
                                  (w.overcommit ? "Overcommitted" : "");
                         });

TEST_F(SpeculationTest, GivesThemOnEveryInstructionSetAndOfEveryType) {
  for (const HighwayTarget& target : HighwayTargets()) {
    for (const auto& [weights, kv] :
         {std::pair("fp16", "fp16"), std::pair("bf16", "fp32"), std::pair("int8", "fp16")}) {
      SCOPED_TRACE(target.name + ", weights " + weights + ", keys and values " + kv);
      const ForceHighwayTarget force(target);
      World world;
      world.weights = weights;
      world.kv = kv;
      const Drafted all = Compare(*Make(Options(world)), world);
      EXPECT_GT(all.accepted, world.requests / 4);
      EXPECT_GT(all.drafted - all.accepted, world.requests / 4);
      if (HasFailure()) return;
    }
  }
}

}  // namespace
}  // namespace dejavu
