// Steps that a device keeps and runs again give what launching them one by one gives, bit by bit, every time; and the
// probe that dejavu-bench takes for the bandwidth reads all of its buffer.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "engine/model/predictor_file.h"
#include "engine/ranks/model_runner.h"
#include "gtest/gtest.h"
#include "module_under_test.h"
#include "tests/bench/device_probe.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/random_predictor.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

constexpr int kSteps = 4;  // as they are, recorded, and replayed twice

// Each slot decodes a golden's prompt and then what is most likely. The logits of all steps. A model that is observed
// is never kept (OptModel::StepKey).
std::vector<float> Decode(ModelRunner& runner, Tier tier, int slots, bool observed) {
  ModelObserver observer;
  runner.model().set_observer(observed ? &observer : nullptr);
  std::vector<int32_t> next;
  for (int slot = 0; slot < slots; ++slot) next.push_back(5 + slot);
  SparsityParams sparsity;
  sparsity.tier = tier;
  std::vector<float> all;
  for (int step = 0; step < kSteps; ++step) {
    Batch& rows = runner.StartBatch();
    for (int slot = 0; slot < slots; ++slot) {
      rows.AddDecodeRow(slot, step, next[slot], /*wants_logits=*/true, sparsity);
    }
    const absl::Span<const float> logits = runner.Run();
    all.insert(all.end(), logits.begin(), logits.end());
    const auto vocab = static_cast<std::ptrdiff_t>(logits.size()) / slots;
    for (int slot = 0; slot < slots; ++slot) {
      const auto row = logits.begin() + slot * vocab;
      next[slot] = static_cast<int32_t>(std::max_element(row, row + vocab) - row);
    }
  }
  runner.model().set_observer(nullptr);
  return all;
}

class Replay : public testing::TestWithParam<std::string> {};

TEST_P(Replay, GivesWhatLaunchingGivesEveryTime) {
  setenv("DEJAVU_CUDA_MODULE", "", 1);  // dlopen's name for the program itself
  simt::GetEmulation() = simt::Emulation();
  const ScratchDirectory scratch;
  const std::string path = CheckpointPath(GetParam());
  ModelRunner::Options options;
  options.model = path;
  options.device = "cuda";
  options.predictor =
      WritePredictorFor(path, RandomPredictor(*OptConfig::Load(path), WeightsHashOf(path), 3), scratch.Path("p"));
  options.slots = 4;
  options.window = 32;
  const auto runner = ModelRunner::Create(options, nullptr);
  ASSERT_TRUE(runner.ok()) << runner.status();
  for (const Tier tier : {Tier::kDense, Tier::kExact, Tier::kBalanced}) {
    for (const int slots : {1, 4}) {
      SCOPED_TRACE(testing::Message() << Name(tier) << ", " << slots << " rows");
      const std::vector<float> launched = Decode(**runner, tier, slots, /*observed=*/true);
      simt::GetEmulation().captured_launches = 0;
      EXPECT_EQ(Decode(**runner, tier, slots, /*observed=*/false), launched);
      EXPECT_GT(simt::GetEmulation().captured_launches, 0);
      EXPECT_EQ(Decode(**runner, tier, slots, /*observed=*/false), launched);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, Replay, testing::Values("pre-norm-hd64", "post-norm-350m-form"), [](const auto& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST(DeviceProbe, ReadsAllOfItsBuffer) {
  simt::GetEmulation() = simt::Emulation();
  for (const int64_t bytes : {int64_t{16}, int64_t{1} << 18, (int64_t{1} << 20) + 48}) {
    const auto probe = DeviceProbe::Create(simt::ModuleUnderTest(), 0, bytes);
    ASSERT_TRUE(probe.ok()) << probe.status();
    EXPECT_GT((*probe)->Measure(), 0.0) << bytes;  // throws where the sum is wrong
  }
}

}  // namespace
}  // namespace dejavu
