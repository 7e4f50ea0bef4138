// What requests want of their tokens, on the emulated device: the tokens and log-probabilities of the CPU, without the
// logits coming to the host, and without the host in the way of the next step.
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/model/opt_config.h"
#include "gtest/gtest.h"
#include "kernels/draw.h"
#include "module_under_test.h"
#include "served_model.h"
#include "tests/engine/golden.h"
#include "tests/engine/serving/collecting_sink.h"

namespace dejavu {
namespace {

const std::string kModel = "pre-norm-hd64";

class ServedDraws : public testing::Test {
 protected:
  void SetUp() override {
    simt::GetEmulation() = simt::Emulation();
    prompt_ = LoadGoldens(kModel)[0].prompt;
  }

  Request Draw(float temperature, uint64_t seed) const {
    Request request = Greedy(prompt_, Tier::kExact);
    request.ignore_eos = true;
    request.sampling.temperature = temperature;
    request.sampling.seed = seed;
    return request;
  }

  using Heard = std::vector<std::vector<CollectingSink::HeardToken>>;
  static Heard Serve(Engine& engine, const std::vector<Request>& requests) {
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    for (const Request& request : requests) {
      sinks.push_back(std::make_shared<CollectingSink>());
      EXPECT_TRUE(engine.Submit(request, sinks.back()).ok());
    }
    Heard heard;
    for (const auto& sink : sinks) {
      EXPECT_TRUE(sink->WaitForFinish().status.ok());
      heard.push_back(sink->tokens());
    }
    return heard;
  }

  static void ExpectSame(const Heard& got, const Heard& want) {
    ASSERT_EQ(got.size(), want.size());
    for (size_t r = 0; r < got.size(); ++r) {
      ASSERT_EQ(got[r].size(), want[r].size()) << "request " << r;
      for (size_t i = 0; i < got[r].size(); ++i) {
        SCOPED_TRACE(testing::Message() << "request " << r << ", token " << i);
        const CollectingSink::HeardToken &a = got[r][i], &b = want[r][i];
        EXPECT_EQ(a.id, b.id);
        EXPECT_EQ(a.has_logprob, b.has_logprob);
        EXPECT_NEAR(a.logprob, b.logprob, 1e-3);
        EXPECT_EQ(a.rank, b.rank);
        ASSERT_EQ(a.top.size(), b.top.size());
        for (size_t k = 0; k < a.top.size(); ++k) EXPECT_NEAR(a.top[k].logprob, b.top[k].logprob, 1e-3);
        if (!a.top.empty()) {
          EXPECT_EQ(a.top[0].id, b.top[0].id);
        }
      }
    }
  }

  std::vector<int32_t> prompt_;
};

TEST_F(ServedDraws, OfEveryKindSideBySideAreTheCpus) {
  const auto engine = MakeEngine(kModel, "cuda"), cpu = MakeEngine(kModel, "cpu");
  std::vector<Request> requests(4, Draw(0.8f, 3));
  requests[0].sampling.top_k = 5;
  requests[0].logprobs = true;
  requests[0].top_logprobs = 4;
  requests[1].sampling.top_p = 0.9f;
  requests[1].sampling.min_p = 0.01f;
  requests[2].sampling.repetition_penalty = 1.3f;
  requests[2].sampling.presence_penalty = 0.2f;
  requests[2].sampling.frequency_penalty = 0.1f;
  requests[2].sampling.logit_bias = {{17, 2.0f}, {5, -1.0f}};
  requests[2].logprobs = true;
  requests[3].sampling.temperature = 0.0f;
  requests[3].sampling.allowed_token_ids = {4, 9, 11, 30, 31};
  requests[3].stop_token_ids = {9, 11, 30};
  requests[3].min_new_tokens = 6;
  simt::GetEmulation().ResetCounts();
  const int64_t before = engine->stats().steps;
  const Heard heard = Serve(*engine, requests);
  const int64_t steps = engine->stats().steps - before;
  constexpr int64_t kInVain = 4;  // steps that ran ahead of an end
  EXPECT_LE(simt::GetEmulation().uploads, steps + kInVain) << "a step uploads once";
  EXPECT_LE(simt::GetEmulation().fetches, 4 * (steps + kInVain))
      << "tokens, their details, counts of what was read, and of what float16 could not hold";
  const OptConfig config = *OptConfig::Load(CheckpointPath(kModel));
  EXPECT_LT(simt::GetEmulation().fetched_bytes, steps * config.vocab * 4) << "no row of logits in any step";
  ExpectSame(heard, Serve(*cpu, requests));
}

TEST_F(ServedDraws, KeepTheLogitsOfAStepThatWantsThemWhole) {
  const auto engine = MakeEngine(kModel, "cuda"), cpu = MakeEngine(kModel, "cpu");
  std::vector<Request> requests(3, Draw(0.8f, 3));
  requests[0].sampling.top_k = 5;
  requests[1].logprobs = true;
  requests[1].top_logprobs = kMostTop + 1;
  requests[2].score = true;
  requests[2].max_new_tokens = 0;
  requests[2].score_top_logprobs = 2;
  ExpectSame(Serve(*engine, requests), Serve(*cpu, requests));
}

// Bit by bit what the same device says of the prompt, and then what it generates without being asked.
TEST_F(ServedDraws, FollowAPromptThatIsScored) {
  const auto engine = MakeEngine(kModel, "cuda"), cpu = MakeEngine(kModel, "cpu");
  std::vector<Request> both(3, Draw(0.8f, 3));
  both[1].sampling.top_k = 5;
  both[2].sampling.repetition_penalty = 1.3f;
  std::vector<Request> prompts, outputs;
  for (Request& request : both) {
    request.logprobs = true;
    request.top_logprobs = 1;
    outputs.push_back(request);
    request.score = true;
    request.score_top_logprobs = 2;
    prompts.push_back(request);
    prompts.back().max_new_tokens = 0;
  }
  const Heard got = Serve(*engine, both), of_output = Serve(*engine, outputs);
  Heard want = Serve(*engine, prompts);
  for (size_t r = 0; r < want.size(); ++r) {
    want[r].insert(want[r].end(), of_output[r].begin(), of_output[r].end());
    ASSERT_EQ(got[r].size(), want[r].size());
    for (size_t i = 0; i < want[r].size(); ++i) EXPECT_EQ(got[r][i].logprob, want[r][i].logprob) << "token " << i;
  }
  ExpectSame(got, want);
  ExpectSame(got, Serve(*cpu, both));
}

TEST_F(ServedDraws, RunAheadUnlessAPenaltyWaitsForTheToken) {
  const auto engine = MakeEngine(kModel, "cuda");
  Request cut = Draw(0.8f, 3);
  cut.sampling.top_k = 40;
  cut.sampling.top_p = 0.95f;
  cut.sampling.logit_bias = {{17, 2.0f}};
  cut.logprobs = true;
  simt::GetEmulation().ResetCounts();
  Serve(*engine, {cut});
  EXPECT_GT(simt::GetEmulation().waits_behind, kTokens / 2);
  cut.sampling.frequency_penalty = 0.1f;
  simt::GetEmulation().ResetCounts();
  Serve(*engine, {cut});
  EXPECT_EQ(simt::GetEmulation().waits_behind, 0);
}

// Bit by bit what the same device gives without, as long as a step has at most 32 rows.
TEST_F(ServedDraws, AreTheSameWithSpeculation) {
  const std::string path = testing::TempDir() + "speculation.safetensors";
  const auto engine = MakeEngine(kModel, "cuda", WriteRandomPredictor(kModel, path));
  EXPECT_TRUE(engine != nullptr);
  std::vector<Request> plain = {Draw(0.0f, 1), Draw(0.8f, 3), Draw(1.2f, 4)};
  plain[1].sampling.repetition_penalty = 1.3f;
  plain[2].logprobs = true;
  plain[2].top_logprobs = 3;
  std::vector<Request> drafted = plain;
  for (Request& request : drafted) request.speculation = {SpeculationMode::kAlways, Tier::kHigh, /*lookup=*/true, 5};
  const Heard want = Serve(*engine, plain), got = Serve(*engine, drafted);
  EXPECT_GT(engine->stats().speculation.rounds, 3);
  ExpectSame(got, want);
  for (size_t i = 0; i < got[2].size(); ++i) EXPECT_EQ(got[2][i].logprob, want[2][i].logprob) << "token " << i;
}

}  // namespace
}  // namespace dejavu
