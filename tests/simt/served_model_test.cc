// The engine on the emulated device: the same loader, backend, kernels and recorded steps as on a GPU, against the
// golden tokens of Hugging Face Transformers and against the engine on the CPU. Some thread orders; AddressSanitizer
// looks on.
#include <algorithm>
#include <latch>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/model/opt_config.h"
#include "engine/model/predictor_file.h"
#include "gtest/gtest.h"
#include "module_under_test.h"
#include "served_model.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/random_predictor.h"
#include "tests/engine/serving/collecting_sink.h"
#include "tests/engine/tiny_checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

class ServedModel : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    simt::GetEmulation().order = 0;
    simt::GetEmulation().ResetCounts();
  }
  void TearDown() override { simt::GetEmulation().order = 0; }
};

TEST_P(ServedModel, DecodesTheGoldensAloneAndInABatch) {
  const std::vector<Golden> goldens = LoadGoldens(GetParam());
  const auto engine = MakeEngine(GetParam(), "cuda");
  ASSERT_NE(engine, nullptr);
  EXPECT_NE(engine->backend_description().find("cuda"), std::string::npos) << engine->backend_description();
  for (const Tier tier : {Tier::kDense, Tier::kExact}) {
    SCOPED_TRACE(Name(tier));
    simt::GetEmulation().order = tier == Tier::kDense ? 0 : 7;
    const auto alone = Generate(*engine, {Greedy(goldens[0].prompt, tier)});
    ExpectGolden(alone[0], goldens[0]);
    std::vector<Request> requests;
    for (int i = 0; i < 4; ++i) requests.push_back(Greedy(goldens[i % 3].prompt, tier));
    const auto together = Generate(*engine, requests);
    for (int i = 0; i < 4; ++i) {
      SCOPED_TRACE(i);
      ExpectGolden(together[i], goldens[i % 3]);
    }
    EXPECT_EQ(together[0], alone[0]) << "batch-mates change nothing";
    EXPECT_EQ(together[3], together[0]);
  }
}

// Alone and in a batch of different lengths, with weights as stored and in int8.
TEST(ServedHead, OfItsOwnGivesWhatItGivesOnTheCpu) {
  const ScratchDirectory scratch;
  TinyCheckpoint::Random(11).Untie(12).Write(scratch);
  for (const char* weights : {"stored", "int8"}) {
    SCOPED_TRACE(weights);
    std::vector<std::vector<int32_t>> ids[2];
    for (const bool on_device : {false, true}) {
      EngineOptions options = ServedOptions("", on_device ? "cuda" : "cpu", "none");
      options.model = scratch.path();
      options.weights = weights;
      const auto engine = MakeEngine(options);
      ASSERT_NE(engine, nullptr);
      ids[on_device] = Generate(*engine, {Greedy({2, 7, 30}, Tier::kDense), Greedy({2, 41}, Tier::kDense)});
    }
    EXPECT_EQ(ids[1], ids[0]);
  }
}

class PredictedModel : public ServedModel {};

TEST_P(PredictedModel, GivesWhatItGivesOnTheCpu) {
  const std::vector<Golden> goldens = LoadGoldens(GetParam());
  const ScratchDirectory scratch;
  const std::string predictor = WriteRandomPredictor(GetParam(), scratch.Path("p"));
  const auto engine = MakeEngine(GetParam(), "cuda", predictor), cpu = MakeEngine(GetParam(), "cpu", predictor);
  ASSERT_NE(engine, nullptr);
  ASSERT_NE(cpu, nullptr);
  for (const Tier tier : {Tier::kHigh, Tier::kBalanced, Tier::kFast}) {
    SCOPED_TRACE(Name(tier));
    simt::GetEmulation().order = 10 + static_cast<uint64_t>(tier);
    const Request request = Greedy(goldens[0].prompt, tier, /*deterministic=*/true);
    const auto alone = Generate(*engine, {request});
    EXPECT_EQ(alone, Generate(*cpu, {request}));
    std::vector<Request> requests;
    for (int i = 0; i < 4; ++i) requests.push_back(Greedy(goldens[i % 3].prompt, tier, /*deterministic=*/true));
    const auto together = Generate(*engine, requests);
    EXPECT_EQ(together, Generate(*cpu, requests));
    EXPECT_EQ(together[0], alone[0]) << "a deterministic request depends on no batch-mate";
  }
}

INSTANTIATE_TEST_SUITE_P(AllForms, ServedModel, testing::ValuesIn(GoldenCheckpoints()), CheckpointTestName);
INSTANTIATE_TEST_SUITE_P(BothNorms, PredictedModel, testing::Values("pre-norm-hd80", "post-norm-350m-form"),
                         CheckpointTestName);

TEST(RecordedStep, TakesAtMostSevenLaunchesALayer) {
  const std::string name = "pre-norm-hd64";
  const ScratchDirectory scratch;
  const OptConfig config = *OptConfig::Load(CheckpointPath(name));
  PredictorData data = RandomPredictor(config, WeightsHashOf(CheckpointPath(name)), 3);
  for (LayerPredictorData& layer : data.layers) layer.heads = {};
  const std::string predictor = WritePredictorFor(CheckpointPath(name), data, scratch.Path("p"));
  const auto engine = MakeEngine(name, "cuda", predictor);
  ASSERT_NE(engine, nullptr);
  const std::vector<int32_t> prompt = LoadGoldens(name)[0].prompt;
  for (const Tier tier : {Tier::kBalanced, Tier::kExact, Tier::kDense}) {
    const int64_t before = simt::GetEmulation().all_launches;
    Generate(*engine, {Greedy(prompt, tier)});
    // Two embeddings; the last sum; the rows, norm and product of the head; the draw.
    constexpr int64_t kBeside = 7;
    EXPECT_LE(simt::GetEmulation().captured_launches, 7 * config.layers + kBeside) << Name(tier);
    EXPECT_GT(simt::GetEmulation().captured_launches, 5 * config.layers) << Name(tier);
    EXPECT_GT(simt::GetEmulation().all_launches - before, (kTokens - 1) * simt::GetEmulation().captured_launches)
        << "a step that is replayed launches what was recorded";
  }
}

// The step after the one that the host waits for is under way by then, but nobody can tell by the tokens.
TEST(RunsAhead, WhoComesStopsAndLeavesInBetweenChangesNoToken) {
  const std::string name = "pre-norm-hd64";
  const std::vector<Golden> goldens = LoadGoldens(name);
  const auto tokens = [&](const std::string& device) {
    const auto engine = MakeEngine(name, device);
    std::vector<Request> requests;
    for (int i = 0; i < 3; ++i) requests.push_back(Greedy(goldens[i].prompt, Tier::kExact));
    requests[0].stop_token_ids = {goldens[0].greedy[6]};  // unforeseen
    requests[1].max_new_tokens = 9;
    requests[2].sampling.temperature = 0.8f;
    requests[2].sampling.seed = 5;
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    // Another one comes and one that runs goes when the last has some tokens.
    const auto late = std::make_shared<CollectingSink>();
    uint64_t leaver = 0;
    std::latch all_there{1};
    const auto leaving = std::make_shared<CollectingSink>([&](size_t count) {
      if (count == 1) all_there.wait();
      return true;
    });
    const auto last = std::make_shared<CollectingSink>([&](size_t count) {
      if (count == 4) {
        EXPECT_TRUE(engine->Submit(Greedy(goldens[0].prompt, Tier::kDense), late).ok());
      }
      if (count == 8) engine->Cancel(leaver);
      return true;
    });
    sinks = {std::make_shared<CollectingSink>(), std::make_shared<CollectingSink>(), last};
    Request long_one = Greedy(goldens[1].prompt, Tier::kExact);
    long_one.max_new_tokens = 40;
    leaver = *engine->Submit(long_one, leaving);
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(engine->Submit(requests[i], sinks[i]).ok());
    all_there.count_down();
    sinks.push_back(late);
    std::vector<std::vector<int32_t>> ids;
    for (const auto& sink : sinks) {
      EXPECT_TRUE(sink->WaitForFinish().status.ok());
      ids.push_back(sink->ids());
    }
    EXPECT_EQ(leaving->WaitForFinish().reason, FinishReason::kCancelled);
    EXPECT_TRUE(engine->WaitIdle(std::chrono::steady_clock::now() + std::chrono::seconds(60)));
    EXPECT_EQ(engine->stats().kv_blocks_free, engine->stats().kv_blocks_total);
    return ids;
  };
  simt::GetEmulation().ResetCounts();
  const auto on_device = tokens("cuda");
  EXPECT_GT(simt::GetEmulation().waits_behind, 10);
  EXPECT_EQ(on_device, tokens("cpu"));
}

// In steps that are recorded and replayed, and run ahead, the count of each begins anew.
TEST(RecordedStep, CountsTheKeysAndValuesBeyondHalfPrecision) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(6);
  for (const int feature : {1, 7, 15}) {
    tiny.tensors.at("model.decoder.layers.1.self_attn.v_proj.bias").data[feature] = -1e5f;
  }
  const ScratchDirectory scratch;
  tiny.Write(scratch);
  EngineOptions options = ServedOptions("pre-norm-hd64", "cuda");
  options.model = scratch.path();
  const auto engine = MakeEngine(options);
  ASSERT_NE(engine, nullptr);
  for (const int tokens : {1, 16, 20}) {
    const auto sink = std::make_shared<CollectingSink>();
    Request request = Greedy({2, 7, 9, 11, 13}, Tier::kExact);
    request.max_new_tokens = tokens;
    ASSERT_TRUE(engine->Submit(request, sink).ok());
    EXPECT_EQ(sink->WaitForFinish().saturated_kv_values, 3 * (5 + tokens - 1)) << tokens;
  }
}

TEST(RecordedStep, RunsAsItIsWhereThereIsNoMemoryForIt) {
  const std::vector<Golden> goldens = LoadGoldens("pre-norm-hd64");
  simt::GetEmulation().refuse_graphs = true;
  const auto engine = MakeEngine("pre-norm-hd64", "cuda");
  ExpectGolden(Generate(*engine, {Greedy(goldens[0].prompt, Tier::kExact)})[0], goldens[0]);
  simt::GetEmulation().refuse_graphs = false;
}

TEST(DeviceFault, FailsTheRequestsAndTheEngineWithItsReason) {
  const auto engine = MakeEngine("pre-norm-hd64", "cuda");
  ASSERT_NE(engine, nullptr);
  const auto sink = std::make_shared<CollectingSink>([](size_t tokens) {
    simt::GetEmulation().fail_next_launch = tokens == 2;
    return true;
  });
  ASSERT_TRUE(engine->Submit(Greedy(LoadGoldens("pre-norm-hd64")[0].prompt, Tier::kExact), sink).ok());
  const Finish finish = sink->WaitForFinish();
  EXPECT_EQ(finish.reason, FinishReason::kError);
  EXPECT_EQ(finish.status.code(), absl::StatusCode::kInternal) << finish.status;
  EXPECT_TRUE(engine->failed());
  EXPECT_EQ(sink->ids().size(), 2u);
}

}  // namespace
}  // namespace dejavu
