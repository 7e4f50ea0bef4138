// Speculation on the emulated device: bit by bit what the same device gives without, as long as a step has at most 32
// rows, and the host waits for no draft before the next one is under way.
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/model/opt_config.h"
#include "gtest/gtest.h"
#include "module_under_test.h"
#include "served_model.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/random_predictor.h"
#include "tests/engine/serving/collecting_sink.h"
#include "tests/engine/serving/random_load.h"
#include "tests/engine/tiny_checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

constexpr RandomLoad::Sizes kSizes = {.context = 32, .vocabulary = 150};

struct World {
  int max_batch = 4;
  bool overcommit = false;
  bool together = true;
  bool penalties = true;  // whoever has one keeps all that draft beside it from running ahead
  int requests = 16;
};

class ServedSpeculation : public testing::Test {
 protected:
  std::unique_ptr<Engine> Serve(const World& world) {
    simt::GetEmulation() = simt::Emulation();
    TinyCheckpoint::Random(6, 16, 40, 2, kSizes.vocabulary).Write(scratch_);
    const PredictorData data = RandomPredictor(*OptConfig::Load(scratch_.path()), WeightsHashOf(scratch_.path()), 3);
    EngineOptions options =
        ServedOptions("", "cuda", WritePredictorFor(scratch_.path(), data, scratch_.Path("predictor")));
    options.model = scratch_.path();
    options.shadow_fallback = false;
    options.scheduler.max_batch = world.max_batch;
    options.scheduler.prefill_chunk_tokens = 5;
    options.scheduler.overcommit = world.overcommit;
    options.scheduler.speculation_gain = 0.0;
    options.admission.max_waiting_requests = 1000;
    options.admission.deadline_slack = 0.0;
    options.kv.block_tokens = 4;
    return MakeEngine(options);
  }

  // Drafts of the tier, none of which ends the text.
  static Request DraftedGreedily(int tokens) {
    Request request = Greedy({2, 7, 9}, Tier::kExact);
    request.max_new_tokens = tokens;
    request.speculation = {SpeculationMode::kAlways, Tier::kHigh, /*lookup=*/false, 5};
    return request;
  }

  const ScratchDirectory scratch_;
};

class RandomSpeculation : public ServedSpeculation, public testing::WithParamInterface<World> {};

TEST_P(RandomSpeculation, GivesTheTokensOfTheSameRequestsWithout) {
  const World world = GetParam();
  const auto engine = Serve(world);
  ASSERT_NE(engine, nullptr);
  std::vector<Asked> load = RandomLoad(world.max_batch + world.overcommit, kSizes).Draw(world.requests);
  for (Asked& asked : load) {
    SamplingParams& sampling = asked.request.sampling;
    if (!world.penalties) sampling.repetition_penalty = 1.0f;
    if (!world.penalties) sampling.presence_penalty = sampling.frequency_penalty = 0.0f;
  }
  const Drafted all = ExpectSameWithSpeculation(*engine, load, world.together);
  EXPECT_GT(all.rounds, world.requests / 2);
  EXPECT_GT(all.accepted, world.requests / 4);
  EXPECT_GT(all.drafted - all.accepted, world.requests / 4);
  EXPECT_GT(simt::GetEmulation().waits_behind, 0);
}

INSTANTIATE_TEST_SUITE_P(Worlds, RandomSpeculation,
                         testing::Values(World{1, false, true, true, 12}, World{4, false, true, false, 24},
                                         World{8, true}, World{4, true, false, false, 12}),
                         [](const auto& info) {
                           const World& w = info.param;
                           return "Batch" + std::to_string(w.max_batch) + (w.overcommit ? "Overcommitted" : "") +
                                  (w.penalties ? "" : "Unpenalised") + (w.together ? "" : "AsTheyCome");
                         });

TEST_F(ServedSpeculation, HasTheNextStepUnderWayBehindEachDraft) {
  const auto engine = Serve({});
  ASSERT_NE(engine, nullptr);
  Request request = DraftedGreedily(20);
  for (const bool penalised : {false, true}) {
    SCOPED_TRACE(penalised);
    // A penalty counts the draft before: the host has to know it.
    if (penalised) request.sampling.frequency_penalty = 0.1f;
    simt::GetEmulation().ResetCounts();
    const auto sink = std::make_shared<CollectingSink>();
    ASSERT_TRUE(engine->Submit(request, sink).ok());
    const SpeculationReport report = sink->WaitForFinish().speculation;
    const int64_t drafts = report.of_source[static_cast<size_t>(DraftSource::kTier)].drafted;
    EXPECT_GT(report.rounds, 2);
    EXPECT_EQ(simt::GetEmulation().waits_behind, penalised ? 0 : drafts);
  }
}

// Drafts of any number of rows and checks of any number of drafts are recorded as other steps are.
TEST_F(ServedSpeculation, ReplaysItsSteps) {
  const auto engine = Serve({});
  ASSERT_NE(engine, nullptr);
  int64_t rounds = 0, steps = 0;
  for (int i = 0; i < 2; ++i) {
    simt::GetEmulation().ResetCounts();
    const int64_t before = engine->stats().steps;
    const auto sink = std::make_shared<CollectingSink>();
    ASSERT_TRUE(engine->Submit(DraftedGreedily(20), sink).ok());
    rounds = sink->WaitForFinish().speculation.rounds;
    steps = engine->stats().steps - before;
  }
  // The second time all that the first has recorded is replayed: but for the prompt's step, which has no draft.
  EXPECT_GT(rounds, 2);
  EXPECT_GE(simt::GetEmulation().replays, steps - 3);
}

}  // namespace
}  // namespace dejavu
