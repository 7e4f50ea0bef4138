// A model over several ranks gives what it gives alone: the goldens of Hugging Face Transformers, every tier, and the
// same bits in every run. Ranks are threads, or, where mpirun runs this program, processes (one golden checkpoint each
// time, named by GROUP_CHECKPOINT: a process joins MPI once).
#include "engine/ranks/model_group.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/ranks/model_runner.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/mpi/open_mpi.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/random_predictor.h"
#include "tests/engine/serving/collecting_sink.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

std::string PredictorOf(const std::string& name, const std::string& path) {
  const OptConfig config = *OptConfig::Load(CheckpointPath(name));
  return WritePredictorFor(CheckpointPath(name), RandomPredictor(config, WeightsHashOf(CheckpointPath(name)), 3), path);
}

ModelRunner::Options OptionsOf(const std::string& name, int ranks, const std::string& predictor = "none") {
  ModelRunner::Options options;
  options.model = CheckpointPath(name);
  options.predictor = predictor;
  options.ranks = ranks;
  options.threads = 1;
  options.slots = 2;
  options.max_audits = 4;
  options.window = OptConfig::Load(options.model)->context;
  return options;
}

std::unique_ptr<ModelRunner> RunnerOf(const ModelRunner::Options& options) {
  auto runner = ModelRunner::Create(options, nullptr);
  EXPECT_TRUE(runner.ok()) << runner.status();
  return runner.ok() ? *std::move(runner) : nullptr;
}

std::vector<float> LogitsOf(ModelRunner& runner) {
  const absl::Span<const float> logits = runner.Run();
  return {logits.begin(), logits.end()};
}

std::vector<float> Prefill(ModelRunner& runner, const std::vector<int32_t>& prompt, int32_t slot = 0) {
  Batch& batch = runner.StartBatch();
  for (size_t i = 0; i < prompt.size(); ++i) batch.AddRow(slot, static_cast<int32_t>(i), prompt[i], true);
  return LogitsOf(runner);
}

void ExpectClose(const std::vector<float>& got, const std::vector<float>& want, float share = 1e-3f) {
  ASSERT_EQ(got.size(), want.size());
  float largest = 0, error = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    largest = std::max(largest, std::abs(want[i]));
    const float difference = std::abs(got[i] - want[i]);
    error = std::isnan(difference) ? INFINITY : std::max(error, difference);
  }
  EXPECT_LE(error, share * largest);
}

void ExpectGoldens(ModelRunner& runner, const std::vector<Golden>& goldens) {
  const int32_t vocab = runner.config().vocab;
  for (size_t k = 0; k < goldens.size(); ++k) {
    SCOPED_TRACE(testing::Message() << "prompt " << k);
    const Golden& golden = goldens[k];
    std::vector<float> logits = Prefill(runner, golden.prompt);
    ExpectClose(logits, golden.logits);
    auto position = static_cast<int32_t>(golden.prompt.size());
    for (size_t i = 0; i < golden.greedy.size(); ++i, ++position) {
      const auto last = logits.end() - vocab;
      if (golden.margin[i] > 2e-3f) {
        EXPECT_EQ(std::max_element(last, logits.end()) - last, golden.greedy[i]) << "step " << i;
      }
      runner.StartBatch().AddDecodeRow(0, position, golden.greedy[i], true, {});
      logits = LogitsOf(runner);
    }
  }
}

struct TierStep {
  std::vector<float> logits;
  StepCounts counts;
};

// Two sequences decode a step in `tier`, one of them audited.
TierStep DecodeIn(ModelRunner& runner, const std::vector<Golden>& goldens, Tier tier) {
  for (int slot : {0, 1}) Prefill(runner, goldens[slot].prompt, slot);
  Batch& batch = runner.StartBatch();
  SparsityParams sparsity;
  sparsity.tier = tier;
  for (int slot : {0, 1}) {
    batch.AddDecodeRow(slot, static_cast<int32_t>(goldens[slot].prompt.size()), goldens[slot].greedy[0], true,
                       sparsity);
  }
  if (IsPredicted(tier)) batch.audit_rows = {1};
  TierStep step;
  step.logits = LogitsOf(runner);
  step.counts = runner.counts();
  return step;
}

// A rank's rounding may move an activation or a prediction across its threshold.
void ExpectNear(const std::vector<int32_t>& got, const std::vector<int32_t>& want, size_t count, const char* what) {
  for (size_t i = 0; i < count; ++i) EXPECT_NEAR(got[i], want[i], 2) << what << " " << i;
}

void ExpectTiersOf(ModelRunner& group, ModelRunner& alone, const std::vector<Golden>& goldens) {
  for (const Tier tier : kAllTiers) {
    SCOPED_TRACE(Name(tier));
    const TierStep got = DecodeIn(group, goldens, tier), want = DecodeIn(alone, goldens, tier);
    ExpectClose(got.logits, want.logits, 5e-3f);
    const size_t layers = group.config().layers;
    ExpectNear(got.counts.selected, want.counts.selected, layers * 2, "selected");
    ExpectNear(got.counts.active, want.counts.active, layers * 3, "active");
    ExpectNear(got.counts.heads, want.counts.heads, layers * 2, "heads");
    ExpectNear(got.counts.union_selected, want.counts.union_selected, layers, "union");
    ExpectNear(got.counts.union_heads, want.counts.union_heads, layers, "union of heads");
    EXPECT_GE(got.counts.imbalance, 1.0);
    EXPECT_LE(got.counts.imbalance, group.group().ranks());
    for (size_t l = 0; IsPredicted(tier) && l < layers; ++l) {
      const float* const audit = got.counts.audit_of(static_cast<int32_t>(l), 0);
      const float* const audit_alone = want.counts.audit_of(static_cast<int32_t>(l), 0);
      for (const int field : {kAuditSelected, kAuditActive, kAuditHits})
        EXPECT_NEAR(audit[field], audit_alone[field], 2);
      EXPECT_NEAR(audit[kAuditMass], audit_alone[kAuditMass], 0.01 * audit_alone[kAuditMass] + 1e-6);
    }
    EXPECT_EQ(got.logits, DecodeIn(group, goldens, tier).logits) << "not the same bits again";
  }
}

class ThreadRanks : public testing::TestWithParam<std::tuple<std::string, int>> {
 protected:
  const std::string name_ = std::get<0>(GetParam());
  const int ranks_ = std::get<1>(GetParam());
  const std::vector<Golden> goldens_ = LoadGoldens(name_);
};

TEST_P(ThreadRanks, GiveTheGoldens) {
  const auto runner = RunnerOf(OptionsOf(name_, ranks_));
  ASSERT_NE(runner, nullptr);
  EXPECT_EQ(runner->group().ranks(), ranks_);
  ExpectGoldens(*runner, goldens_);
  if (ranks_ > 1) {
    EXPECT_GT(runner->group().communication().all_reduces, 0);
  }
}

TEST_P(ThreadRanks, GiveEveryTier) {
  const ScratchDirectory scratch;
  const std::string predictor = PredictorOf(name_, scratch.Path("p"));
  const auto group = RunnerOf(OptionsOf(name_, ranks_, predictor)), alone = RunnerOf(OptionsOf(name_, 1, predictor));
  ASSERT_TRUE(group != nullptr && alone != nullptr);
  ExpectTiersOf(*group, *alone, goldens_);
}

std::vector<std::vector<int32_t>> Generate(const std::string& name, int ranks, const std::string& predictor) {
  EngineOptions options;
  options.model = CheckpointPath(name);
  options.predictor = predictor;
  options.device = "cpu";
  options.tensor_parallel = ranks;
  options.threads = 1;
  options.pin_threads = false;
  options.scheduler.max_batch = 4;
  options.scheduler.prefill_share = 1e6;
  options.peer_timeout_s = 60;
  auto engine = Engine::Create(options, 0, nullptr);
  EXPECT_TRUE(engine.ok()) << engine.status();
  const std::vector<Golden> goldens = LoadGoldens(name);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  // Greedy and drawn on the ranks, drawn on the host, and with shadow checks.
  for (int i = 0; i < 4; ++i) {
    Request request;
    request.prompt = goldens[i % goldens.size()].prompt;
    request.max_new_tokens = 12;
    request.ignore_eos = true;
    if (i > 0) request.sampling.temperature = 0.9f;
    request.sampling.seed = i;
    if (i == 2) request.sampling.top_k = 5;
    request.logprobs = i == 2;
    request.sparsity.tier = i == 3 ? Tier::kBalanced : Tier::kExact;
    request.sparsity.shadow_every = i == 3 ? 3 : 0;
    request.sparsity.deterministic = true;
    sinks.push_back(std::make_shared<CollectingSink>());
    EXPECT_TRUE((*engine)->Submit(request, sinks.back()).ok());
    EXPECT_TRUE(sinks.back()->WaitForFinish().status.ok());
  }
  std::vector<std::vector<int32_t>> ids;
  for (const auto& sink : sinks) ids.push_back(sink->ids());
  const SparsityStats stats = (*engine)->sparsity_stats();
  EXPECT_GT(stats.shadow_tokens, 0);
  EXPECT_EQ(stats.group_steps > 0, ranks > 1);
  EXPECT_GE(stats.imbalance, static_cast<double>(stats.group_steps));
  return ids;
}

TEST_P(ThreadRanks, ServeTheSameTokensEveryTime) {
  const ScratchDirectory scratch;
  const std::string predictor = PredictorOf(name_, scratch.Path("p"));
  const auto first = Generate(name_, ranks_, predictor);
  EXPECT_EQ(first, Generate(name_, ranks_, predictor));
  for (size_t i = 0; i < first[0].size() && goldens_[0].margin[i] > 2e-3f; ++i) {
    ASSERT_EQ(first[0][i], goldens_[0].greedy[i]) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(AllForms, ThreadRanks,
                         testing::Combine(testing::ValuesIn(GoldenCheckpoints()), testing::Values(1, 2, 3, 4)),
                         [](const auto& info) {
                           std::string name = std::get<0>(info.param) + "_" + std::to_string(std::get<1>(info.param));
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(ModelGroup, SaysOnEveryRankWhyOneCannotLoad) {
  ModelRunner::Options options = OptionsOf("pre-norm-hd64", 3);
  options.predictor = "/nowhere/predictor";
  const auto runner = ModelRunner::Create(options, nullptr);
  EXPECT_THAT(std::string(runner.status().message()), testing::HasSubstr("/nowhere/predictor"));
}

TEST(ModelGroup, HasRanksWithoutHeads) {
  // Heads of 64 and few of them: the last rank has none.
  const std::string name = "pre-norm-hd64";
  const OptConfig config = *OptConfig::Load(CheckpointPath(name));
  const auto runner = RunnerOf(OptionsOf(name, config.heads + 1));
  ASSERT_NE(runner, nullptr);
  ExpectGoldens(*runner, LoadGoldens(name));
}

// Under mpirun.
const char* CheckpointName() { return std::getenv("GROUP_CHECKPOINT"); }

TEST(Processes, GiveTheGoldensAndEveryTier) {
  if (CheckpointName() == nullptr) GTEST_SKIP() << "mpirun runs this one";
  const ScratchDirectory scratch;
  const std::string predictor = PredictorOf(CheckpointName(), scratch.Path("p"));
  const auto group = RunnerOf(OptionsOf(CheckpointName(), 0, predictor));
  ASSERT_NE(group, nullptr);
  EXPECT_EQ(group->group().ranks(), MpirunSize());
  const auto alone = RunnerOf(OptionsOf(CheckpointName(), 1, predictor));
  const std::vector<Golden> goldens = LoadGoldens(CheckpointName());
  ExpectGoldens(*group, goldens);
  ExpectTiersOf(*group, *alone, goldens);
}

}  // namespace

// Everybody but rank 0 follows.
int Follow() {
  const ScratchDirectory scratch;
  const absl::Status status =
      ModelRunner::Follow(OptionsOf(CheckpointName(), 0, PredictorOf(CheckpointName(), scratch.Path("p"))));
  if (!status.ok()) std::cerr << status << "\n";
  return status.ok() ? 0 : 1;
}

}  // namespace dejavu

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (dejavu::MpirunRank() > 0) return dejavu::Follow();
  return RUN_ALL_TESTS();
}
