// Speculation changes no token, no log-probability and no reason to end, bit by bit: random loads with it and without,
// through the engine's public interface.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "engine/engine.h"
#include "engine/model/opt_config.h"
#include "gtest/gtest.h"
#include "kernels/base/check.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/serving/random_load.h"
#include "tests/highway_targets.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

constexpr char kModel[] = "pre-norm-hd128-sharded";

struct World {
  int ranks = 1;
  bool overcommit = false;
  int max_batch = 8;
  int requests = 48;
  std::string weights = "stored", kv = "fp32";
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
      RandomLoad random(world.ranks * 1000 + first + world.overcommit + 7 * world.max_batch, RandomLoad::Sizes());
      const Drafted of_part = ExpectSameWithSpeculation(engine, random.Draw(std::min(part, world.requests - first)));
      all.rounds += of_part.rounds;
      all.drafted += of_part.drafted;
      all.accepted += of_part.accepted;
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
