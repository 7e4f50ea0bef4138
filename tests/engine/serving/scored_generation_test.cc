// A request that scores its prompt and then generates hears, bit by bit, what a score of the prompt says and then what
// the same request without a score gives: random loads through the engine's public interface.
#include <algorithm>
#include <random>

#include "gtest/gtest.h"
#include "kernels/base/check.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/serving/embedded_engine.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

constexpr char kModel[] = "pre-norm-hd128-sharded";
constexpr int kContext = 128;

struct Asked {
  Request request;  // that generates; a score beside it where it has `score`
  int samples = 1;
};

std::vector<Asked> RandomLoad(uint32_t seed, int requests) {
  std::mt19937 random(seed);
  const auto below = [&](int n) { return std::uniform_int_distribution<int>(0, n - 1)(random); };
  std::vector<Asked> load(requests);
  for (Asked& asked : load) {
    std::vector<int32_t> prompt = {2};
    const int family = below(3), length = 1 + below(60);
    for (int i = 1; i < length; ++i) prompt.push_back(i < 24 ? 10 + 20 * family + i : 4 + below(500));
    const SparsityParams sparsity = {kAllTiers[below(5)], /*deterministic=*/true, 0};
    Request& r = asked.request;
    r = SparseRequest(prompt, 1 + below(std::min(60, kContext - length)), sparsity);
    r.score = below(3) != 0;
    r.score_top_logprobs = below(3);
    r.logprobs = true;
    r.top_logprobs = below(4) == 0 ? 200 : below(3);
    r.ignore_eos = below(2) == 0;
    r.urgency = static_cast<Urgency>(below(3));
    r.sampling.seed = static_cast<uint64_t>(below(1000));
    if (below(3) == 0) {
      r.sampling.temperature = 0.9f;
      asked.samples = 1 + below(3);
    }
    if (below(4) == 0) r.sampling.repetition_penalty = 1.3f;
    if (below(4) == 0) r.min_new_tokens = below(r.max_new_tokens + 1);
    for (int i = below(3) * 4; i > 0; --i) r.stop_token_ids.push_back(4 + below(500));
    if (below(2) == 0) {
      r.speculation.mode = below(3) == 0 ? SpeculationMode::kAuto : SpeculationMode::kAlways;
      r.speculation.draft_tier = kPredictedTiers[below(3)];
      r.speculation.lookup = below(2) == 0;
    }
  }
  return load;
}

Request PromptAlone(Request request) {
  request.max_new_tokens = 0;
  request.min_new_tokens = 0;
  return request;
}
Request OutputAlone(Request request) {
  request.score = false;
  return request;
}

// All of them at once, as `asks` has them.
std::vector<std::vector<Got>> Play(Engine& engine, const std::vector<Asked>& load, Request asks(Request)) {
  HeldEngine held(engine);
  std::vector<std::vector<std::shared_ptr<TokenSink>>> sinks;
  for (const Asked& asked : load) {
    std::vector<std::shared_ptr<TokenSink>>& samples = sinks.emplace_back();
    for (int i = 0; i < asked.samples; ++i) samples.push_back(std::make_shared<CollectingSink>());
    EXPECT_TRUE(engine.SubmitSamples(asks(asked.request), samples).ok());
  }
  held.LetGo();
  std::vector<std::vector<Got>> got = WaitForAll(sinks);
  EXPECT_TRUE(engine.WaitIdle(SteadyTime::max()));
  EXPECT_EQ(engine.stats().kv_blocks_free, engine.stats().kv_blocks_total);
  return got;
}

// Of one sample: what `prompt` has heard, if that is told, and then what `output` has.
void ExpectBoth(const Got& got, const Got* prompt, const Got& output) {
  EXPECT_EQ(got.finish.reason, output.finish.reason);
  EXPECT_EQ(got.finish.stop_token_id, output.finish.stop_token_id);
  EXPECT_EQ(got.finish.generated_tokens, output.finish.generated_tokens);
  EXPECT_EQ(got.finish.prompt_tokens, output.finish.prompt_tokens);
  std::vector<CollectingSink::HeardToken> want;
  if (prompt != nullptr) want = prompt->tokens;
  want.insert(want.end(), output.tokens.begin(), output.tokens.end());
  ASSERT_EQ(got.tokens.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    SCOPED_TRACE(testing::Message() << "token " << i);
    ExpectSameToken(got.tokens[i], want[i]);
  }
}

struct World {
  int ranks = 1;
  bool overcommit = false;
  int requests = 60;
};

class ScoredGeneration : public testing::TestWithParam<World> {
 protected:
  std::unique_ptr<Engine> Make(bool overcommit) {
    EngineOptions options;
    options.model = CheckpointPath(kModel);
    options.predictor = directory_.Path("predictor.safetensors");
    const PredictorData data = MakePredictor(OptConfig::Load(options.model).value(), Tap::kAttentionNorm, 4);
    WritePredictorFor(options.model, data, options.predictor);
    options.shadow_fallback = false;
    options.device = "cpu";
    options.threads = GetParam().ranks;
    options.pin_threads = false;
    options.tensor_parallel = GetParam().ranks;
    options.peer_timeout_s = 100.0;
    options.scheduler.prefill_share = 1e6;  // what is in a step must not depend on how long it takes
    options.scheduler.max_batch = 16;
    options.scheduler.max_step_tokens = 40;
    options.scheduler.prefill_chunk_tokens = 7;
    options.scheduler.score_rows = 11;
    options.scheduler.overcommit = overcommit;
    if (overcommit) options.kv.memory_mib = 1;
    options.admission.max_waiting_requests = 1000;
    options.kv.block_tokens = 4;
    options.kv.dtype = "fp32";
    auto engine = Engine::Create(options, 0, nullptr);
    CHECK(engine.ok()) << engine.status().ToString();
    return *std::move(engine);
  }

  const ScratchDirectory directory_;
};

TEST_P(ScoredGeneration, IsTheScoreAndThenTheGeneration) {
  const auto engine = Make(GetParam().overcommit);
  const std::vector<Asked> load = RandomLoad(7 + GetParam().ranks, GetParam().requests);
  const auto same = [](Request request) { return request; };
  const auto outputs = Play(*engine, load, OutputAlone);
  const auto prompts = Play(*engine, load, PromptAlone);
  const auto got = Play(*engine, load, same);
  int scored = 0, of_many = 0;
  int64_t rounds = 0, shared = 0;
  for (size_t i = 0; i < load.size() && !HasFailure(); ++i) {
    const bool score = load[i].request.score;
    for (int sample = 0; sample < load[i].samples; ++sample) {
      SCOPED_TRACE(testing::Message() << "request " << i << ", sample " << sample);
      const bool told = score && sample == 0;
      ExpectBoth(got[i][sample], told ? &prompts[i][0] : nullptr, outputs[i][sample]);
      EXPECT_EQ(prompts[i][sample].finish.generated_tokens, 0);
      if (told) {
        EXPECT_EQ(prompts[i][sample].tokens.size(), load[i].request.prompt.size());
        EXPECT_EQ(got[i][sample].finish.cached_prompt_tokens, 0) << "what is cached says nothing";
        rounds += got[i][sample].finish.speculation.rounds;
        ++scored;
      } else if (score) {
        shared += got[i][sample].finish.cached_prompt_tokens;
        ++of_many;
      }
    }
  }
  EXPECT_GT(scored, GetParam().requests / 3);
  EXPECT_GT(of_many, 0);
  EXPECT_GT(rounds, 3) << "after the prompt it may be guessed";
  EXPECT_GT(shared, 0) << "of several samples one computes the prompt";
  if (GetParam().overcommit) {
    EXPECT_GT(engine->stats().preemptions, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Worlds, ScoredGeneration,
                         testing::Values(World{1, false}, World{1, true}, World{2, false, 20}), [](const auto& info) {
                           return "Ranks" + std::to_string(info.param.ranks) +
                                  (info.param.overcommit ? "Overcommitted" : "");
                         });

}  // namespace
}  // namespace dejavu
