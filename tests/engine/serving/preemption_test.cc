// What a request is promised holds with kv.overcommit, too: neither its tokens nor their log-probabilities depend on
// whether sequences were sent back to the queue and computed again. Random loads, through the engine's public
// interface.
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
  Request request;
  int samples = 1;
  size_t leaves_after = 0;  // so many tokens; 0: it stays to its end

  // A prompt is the same in every tier.
  bool promised() const {
    return request.max_new_tokens == 0 || !IsPredicted(request.sparsity.tier) || request.sparsity.deterministic;
  }
};

// Prompts that often begin alike, of every tier, urgency and way to sample.
std::vector<Asked> RandomLoad(uint32_t seed, int requests) {
  std::mt19937 random(seed);
  const auto draw = [&](int below) { return std::uniform_int_distribution<int>(0, below - 1)(random); };
  std::vector<Asked> load(requests);
  for (Asked& asked : load) {
    std::vector<int32_t> prompt = {2};
    const int family = draw(3), length = 1 + draw(24);
    for (int i = 1; i < length; ++i) prompt.push_back(i < 12 ? 10 + 20 * family + i : 4 + draw(500));
    const SparsityParams sparsity = {kAllTiers[draw(5)], draw(3) != 0, draw(4) == 0 ? 3 : 0};
    const bool score = draw(6) == 0;
    while (score && prompt.size() < 90) prompt.push_back(4 + draw(500));  // it takes many steps
    asked.request =
        SparseRequest(prompt, score ? (draw(2) == 0 ? 0 : 1 + draw(30)) : 1 + draw(kContext - length), sparsity);
    asked.request.score = score;
    asked.request.urgency = score ? Urgency::kBatch : static_cast<Urgency>(draw(3));
    asked.request.priority = draw(2);
    asked.request.sampling.seed = static_cast<uint64_t>(draw(1000));
    if (draw(2) == 0 && asked.request.max_new_tokens > 0) {
      asked.request.sampling.temperature = 0.9f;
      asked.samples = 1 + draw(3);
    }
    if (draw(4) == 0) asked.request.sampling.repetition_penalty = 1.3f;
    if (draw(5) == 0) asked.leaves_after = static_cast<size_t>(1 + draw(10));
  }
  return load;
}

// All of them at once.
std::vector<std::vector<Heard>> Play(Engine& engine, const std::vector<Asked>& load) {
  HeldEngine held(engine);
  std::vector<std::vector<std::shared_ptr<TokenSink>>> sinks;
  for (const Asked& asked : load) {
    std::vector<std::shared_ptr<TokenSink>>& samples = sinks.emplace_back();
    for (int i = 0; i < asked.samples; ++i) {
      samples.push_back(
          std::make_shared<CollectingSink>([leaves = asked.leaves_after](size_t count) { return count != leaves; }));
    }
    EXPECT_TRUE(engine.SubmitSamples(asked.request, samples).ok());
  }
  held.LetGo();
  std::vector<std::vector<Heard>> heard;
  for (const auto& samples : sinks) {
    heard.emplace_back();
    for (const auto& sink : samples) heard.back().push_back(Listen(static_cast<CollectingSink&>(*sink)));
  }
  EXPECT_TRUE(engine.WaitIdle(SteadyTime::max()));
  EXPECT_EQ(engine.stats().kv_blocks_free, engine.stats().kv_blocks_total);
  return heard;
}

class Overcommitted : public testing::Test {
 protected:
  EngineOptions Options() {
    EngineOptions options;
    options.model = CheckpointPath(kModel);
    options.predictor = directory_.Path("predictor.safetensors");
    if (predictor_.empty()) {
      const PredictorData data = MakePredictor(OptConfig::Load(options.model).value(), Tap::kAttentionNorm, 4);
      predictor_ = WritePredictorFor(options.model, data, options.predictor);
    }
    options.shadow_fallback = false;  // a layer that falls back does so for everybody
    options.device = "cpu";
    options.threads = 1;
    options.pin_threads = false;
    options.scheduler.prefill_share = 1e6;  // what is in a step must not depend on how long it takes
    options.scheduler.max_batch = 20;
    options.scheduler.max_step_tokens = 40;
    options.scheduler.prefill_chunk_tokens = 5;
    options.kv.block_tokens = 4;
    options.kv.dtype = "fp32";
    return options;
  }
  static std::unique_ptr<Engine> Make(const EngineOptions& options) {
    auto engine = Engine::Create(options, 0, nullptr);
    CHECK(engine.ok()) << engine.status().ToString();
    return *std::move(engine);
  }

  const ScratchDirectory directory_;
  std::string predictor_;
};

TEST_F(Overcommitted, RequestsGetTheTokensThatTheyWereToldAreTheirs) {
  const auto ample = Make(Options());
  EngineOptions options = Options();
  options.scheduler.overcommit = true;
  options.kv.memory_mib = 1;  // 256 positions, where 20 sequences want up to 2560
  const auto scarce = Make(options);
  ASSERT_LT(scarce->stats().kv_blocks_total * 4, ample->stats().kv_blocks_total);
  int promised = 0;
  for (uint32_t seed = 0; seed < 3; ++seed) {
    SCOPED_TRACE(testing::Message() << "load " << seed);
    const std::vector<Asked> load = RandomLoad(seed, 40);
    const auto want = Play(*ample, load);
    const int64_t before = scarce->stats().preemptions;
    const auto got = Play(*scarce, load);
    EXPECT_GT(scarce->stats().preemptions - before, 5) << "there was memory for all of them";
    for (size_t i = 0; i < load.size(); ++i) {
      if (!load[i].promised()) continue;
      SCOPED_TRACE(testing::Message() << "request " << i << ", " << Name(load[i].request.sparsity.tier));
      promised += !load[i].request.score && IsPredicted(load[i].request.sparsity.tier);
      for (int sample = 0; sample < load[i].samples; ++sample) ExpectSameBits(got[i][sample], want[i][sample]);
    }
  }
  EXPECT_EQ(ample->stats().preemptions, 0);
  EXPECT_GT(promised, 20);
}

}  // namespace
}  // namespace dejavu
