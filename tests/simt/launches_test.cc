// What `dejavu-bench launches` says of a step: launches by kind, what they must read against what the model holds and
// the step has counted, and what remains where a kind is left out.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/model/predictor_file.h"
#include "engine/model/weight_bytes.h"
#include "engine/ranks/model_runner.h"
#include "gtest/gtest.h"
#include "kernels/cuda/cuda_backend.h"
#include "module_under_test.h"
#include "tests/bench/launch_kinds.h"
#include "tests/bench/launch_times.h"
#include "tests/bench/launch_trace.h"
#include "tests/engine/golden.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/random_predictor.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

constexpr int kPosition = 5;  // whose keys and values before it are zeros

class Launches : public testing::Test {
 protected:
  void SetUp() override {
    setenv("DEJAVU_CUDA_MODULE", "", 1);  // dlopen's name for the program itself
    simt::GetEmulation() = simt::Emulation();
    const std::string path = CheckpointPath("pre-norm-hd64");
    PredictorData data = RandomPredictor(*OptConfig::Load(path), WeightsHashOf(path), 3);
    for (LayerPredictorData& layer : data.layers) layer.heads = {};
    ModelRunner::Options options;
    options.model = path;
    options.device = "cuda";
    options.predictor = WritePredictorFor(path, data, scratch_.Path("p"));
    options.slots = 16;
    options.window = 32;
    options.wrap_backend = [this](std::unique_ptr<Backend> untraced) {
      untraced.reset();
      return *MakeCudaBackend(trace_.module(), 0);
    };
    auto runner = ModelRunner::Create(options, nullptr);
    ASSERT_TRUE(runner.ok()) << runner.status();
    runner_ = *std::move(runner);
  }

  void Decode(Tier tier, int rows) {
    SparsityParams sparsity;
    sparsity.tier = tier;
    Batch& batch = runner_->StartBatch();
    for (int slot = 0; slot < rows; ++slot) {
      batch.AddDecodeRow(slot, kPosition, 5 + slot, /*wants_logits=*/true, sparsity);
    }
    batch.draws.assign(rows, {});
    runner_->Run();
  }

  std::vector<TracedLaunch> Trace(Tier tier, int rows) {
    return trace_.Of([&] { Decode(tier, rows); });
  }

  // Of the step that was run last, from what it has counted.
  int64_t WeightBytes(Tier tier, int rows) const {
    const OptConfig& config = runner_->config();
    const StepCounts& counts = runner_->counts();
    int64_t bytes = BytesAfterLayers(runner_->weights()) + rows * EmbeddingBytes(runner_->weights());
    for (int32_t l = 0; l < config.layers; ++l) {
      const LayerBytes layer(runner_->weights().layers[l], config);
      bytes += layer.rest + counts.union_heads[l] * layer.head + layer.down_bias;
      bytes += counts.union_selected[l] * layer.up_row + counts.union_down_of(l) * layer.down_row;
      if (!IsPredicted(tier)) continue;
      bytes += NeuronPredictorBytes(runner_->predictor_data()->layers[l].neurons, tier, config.hidden, config.ffn);
    }
    return bytes;
  }

  const ScratchDirectory scratch_;
  LaunchTrace trace_{simt::ModuleUnderTest()};
  std::unique_ptr<ModelRunner> runner_;
};

int64_t KvBytes(const std::vector<LaunchKind>& kinds) {
  int64_t bytes = 0;
  for (const LaunchKind& kind : kinds) bytes += kind.reads.keys_values;
  return bytes;
}

TEST_F(Launches, AreThoseOfTheStepAndReadWhatTheModelHolds) {
  const OptConfig& config = runner_->config();
  const WeightUses uses = UsesOf(runner_->weights());
  for (const Tier tier : {Tier::kDense, Tier::kExact, Tier::kBalanced}) {
    for (const int rows : {1, 4, 16}) {
      SCOPED_TRACE(testing::Message() << Name(tier) << ", " << rows << " rows");
      const size_t launched = Trace(tier, rows).size();
      simt::GetEmulation().captured_launches = 0;
      EXPECT_EQ(Trace(tier, rows).size(), launched) << "recorded";
      EXPECT_EQ(simt::GetEmulation().captured_launches, static_cast<int64_t>(launched));
      const std::vector<TracedLaunch> step = Trace(tier, rows);
      ASSERT_EQ(step.size(), launched) << "replayed";

      DeviceState state(trace_);
      const std::vector<LaunchKind> kinds = KindsOf(step, uses, state);
      int64_t weights = 0, listed = 0;
      size_t of_layers = 0;
      std::set<size_t> places;
      for (const LaunchKind& kind : kinds) {
        weights += kind.reads.weights;
        listed += kind.reads.listed;
        places.insert(kind.places.begin(), kind.places.end());
        const bool of_layer = kind.places.size() >= static_cast<size_t>(config.layers) && kind.name != "Embed";
        if (of_layer) of_layers += kind.places.size();
      }
      EXPECT_EQ(places.size(), step.size()) << "each launch is of one kind";
      EXPECT_EQ(of_layers % config.layers, 0u);
      // Of few rows a sum's last block does the norm. The selection goes beside nothing, so that its list comes in
      // time.
      EXPECT_LE(of_layers, (rows <= 3 ? 5 : 7) * config.layers + (IsPredicted(tier) ? config.layers : 0));
      std::printf("%s, %2d rows: %zu launches a layer\n", std::string(Name(tier)).c_str(), rows,
                  of_layers / config.layers);
      EXPECT_EQ(weights, WeightBytes(tier, rows));
      EXPECT_EQ(listed > 0, tier != Tier::kDense);
      EXPECT_EQ(KvBytes(kinds), int64_t{2} * 2 * config.layers * rows * kPosition * config.hidden);
    }
  }
}

TEST_F(Launches, AreNamedAfterTheirWeights) {
  DeviceState state(trace_);
  const std::vector<LaunchKind> kinds = KindsOf(Trace(Tier::kBalanced, 1), UsesOf(runner_->weights()), state);
  for (const std::string use : {"qkv", "out", "up", "down"}) {
    const auto named = [&](const LaunchKind& kind) { return kind.name.ends_with(" " + use); };
    const auto kind = std::find_if(kinds.begin(), kinds.end(), named);
    ASSERT_NE(kind, kinds.end()) << use;
    EXPECT_EQ(kind->places.size(), static_cast<size_t>(runner_->config().layers)) << use;
  }
  const auto head = std::find_if(kinds.begin(), kinds.end(), [](const auto& k) { return k.name.ends_with(" head"); });
  ASSERT_NE(head, kinds.end());
  EXPECT_EQ(head->places.size(), 1u);
}

TEST_F(Launches, CanBeLeftOutAndComeBack) {
  Decode(Tier::kExact, 4);
  LaunchTimes times(trace_, Trace(Tier::kExact, 4));
  const std::vector<TracedLaunch>& step = times.step();
  const std::vector<int32_t> drawn = runner_->drawn();
  DeviceState state(trace_);
  const std::vector<LaunchKind> kinds = KindsOf(step, UsesOf(runner_->weights()), state);
  std::vector<size_t> all(step.size()), others;
  std::iota(all.begin(), all.end(), size_t{0});
  const auto& down = *std::find_if(kinds.begin(), kinds.end(), [](const auto& k) { return k.name.ends_with(" down"); });
  std::set_difference(all.begin(), all.end(), down.places.begin(), down.places.end(), std::back_inserter(others));

  Playback whole(trace_, step, all), rest(trace_, step, others);
  const auto launches_of = [&](Playback& playback) {
    simt::GetEmulation().ResetCounts();
    playback.Pass();
    trace_.traced().synchronize(trace_.context());  // the last launch may be held back
    return simt::GetEmulation().launches;
  };
  const std::vector<int64_t> with = launches_of(whole), without = launches_of(rest);
  for (size_t kernel = 0; kernel < with.size(); ++kernel) {
    const bool left_out = kernel == static_cast<size_t>(down.shape.kernel);
    EXPECT_EQ(with[kernel] - without[kernel], left_out ? runner_->config().layers : 0) << kernel;
  }

  const LaunchTimes::Found found = times.Measure(down.places, /*repeats=*/1);
  ASSERT_EQ(found.alone_us.size(), 1u);
  EXPECT_GT(found.alone_us[0], 0.0);
  EXPECT_GT(found.step_us[0], found.alone_us[0]);
  // Alone every layer's launch finds the activations that the last layer has left.
  whole.Pass();
  const auto bytes_of = [&](size_t place) { return static_cast<double>(ReadsOf(step, {place}, state).bytes()); };
  EXPECT_NE(bytes_of(down.places.front()), bytes_of(down.places.back()));
  EXPECT_EQ(found.alone_bytes, bytes_of(down.places.back()));

  Decode(Tier::kExact, 4);
  EXPECT_EQ(runner_->drawn(), drawn) << "the step is what it was";
}

}  // namespace
}  // namespace dejavu
