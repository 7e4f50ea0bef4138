// The engine over several devices of the module under test, each a rank in a thread of its own: the same tokens as over
// ranks on the CPU, with the all-reduces part of the recorded steps. And what becomes of it when a rank is lost, or
// cannot join.
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "module_under_test.h"
#include "served_model.h"
#include "tests/engine/golden.h"
#include "tests/engine/serving/collecting_sink.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

class DeviceGroupServes : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    simt::GetEmulation() = simt::Emulation();
    if (!simt::HasDevices(2)) GTEST_SKIP() << "needs two devices";
  }
  void TearDown() override { simt::GetEmulation() = simt::Emulation(); }
};

TEST_P(DeviceGroupServes, TheTokensOfTheCpuWithRecordedSteps) {
  const std::vector<Golden> goldens = LoadGoldens(GetParam());
  const ScratchDirectory scratch;
  const std::string predictor = WriteRandomPredictor(GetParam(), scratch.Path("p"));
  const auto engine = MakeEngine(GetParam(), "cuda", predictor, 2), cpu = MakeEngine(GetParam(), "cpu", predictor, 2);
  ASSERT_NE(engine, nullptr);
  ASSERT_NE(cpu, nullptr);
  for (const Tier tier : {Tier::kDense, Tier::kExact, Tier::kBalanced}) {
    SCOPED_TRACE(Name(tier));
    simt::GetEmulation().order = tier == Tier::kDense ? 0 : 7;
    simt::GetEmulation().captured_all_reduces = 0;
    std::vector<Request> requests;
    for (int i = 0; i < 2; ++i) requests.push_back(Greedy(goldens[i].prompt, tier, /*deterministic=*/true));
    const auto tokens = Generate(*engine, requests);
    EXPECT_EQ(tokens, Generate(*cpu, requests));
    EXPECT_EQ(tokens, Generate(*engine, requests)) << "not the same again";
    if (!IsPredicted(tier)) {
      for (int i = 0; i < 2; ++i) ExpectGolden(tokens[i], goldens[i]);
    }
    EXPECT_GT(simt::GetEmulation().captured_all_reduces, 1);
    // Neurons are selected while the attention is added up.
    EXPECT_EQ(simt::GetEmulation().captured_asides > 0, IsPredicted(tier));
  }
}

INSTANTIATE_TEST_SUITE_P(BothNorms, DeviceGroupServes, testing::Values("pre-norm-hd80", "post-norm-350m-form"),
                         CheckpointTestName);

class DeviceGroupFails : public DeviceGroupServes {};

TEST_P(DeviceGroupFails, ToBeMadeWithoutNcclAndSaysSo) {
  simt::GetEmulation().refuse_groups = true;
  const auto engine = Engine::Create(ServedOptions(GetParam(), "cuda", "none", 2), 0, nullptr);
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kUnavailable) << engine.status();
  EXPECT_THAT(std::string(engine.status().message()), testing::HasSubstr("NCCL"));
}

// A rank fails in the middle of a step. Whether it is the one that serves or another one, nobody waits for ever.
TEST_P(DeviceGroupFails, TheRequestsWhereARankIsLost) {
  for (const int lost : {0, 1}) {
    SCOPED_TRACE(lost);
    EngineOptions options = ServedOptions(GetParam(), "cuda", "none", 2);
    options.peer_timeout_s = 6.0;
    const auto engine = MakeEngine(options);
    ASSERT_NE(engine, nullptr);
    simt::GetEmulation().failing_device = lost;
    const auto sink = std::make_shared<CollectingSink>([](size_t tokens) {
      simt::GetEmulation().fail_next_launch = tokens == 2;
      return true;
    });
    ASSERT_TRUE(engine->Submit(Greedy(LoadGoldens(GetParam())[0].prompt, Tier::kExact), sink).ok());
    const Finish finish = sink->WaitForFinish();
    EXPECT_EQ(finish.reason, FinishReason::kError);
    EXPECT_EQ(finish.status.code(), lost == 0 ? absl::StatusCode::kInternal : absl::StatusCode::kUnavailable)
        << finish.status;
    EXPECT_TRUE(engine->failed());
    EXPECT_EQ(sink->ids().size(), 2u);
  }
}

INSTANTIATE_TEST_SUITE_P(OneForm, DeviceGroupFails, testing::Values("pre-norm-hd64"), CheckpointTestName);

}  // namespace
}  // namespace dejavu
