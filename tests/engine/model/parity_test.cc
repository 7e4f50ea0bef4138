// The forward pass against Hugging Face Transformers: every form of OPT, every chunking, block size, thread count and
// Highway target of this machine.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "engine/formats/checkpoint.h"
#include "engine/model/batch.h"
#include "engine/model/kv_cache.h"
#include "engine/model/opt_model.h"
#include "engine/model/opt_weights.h"
#include "engine/model/predictor.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/communicator.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/engine/golden.h"
#include "tests/highway_targets.h"

namespace dejavu {
namespace {

// One model on one backend with one sequence, driven chunk by chunk.
class ModelUnderTest {
 public:
  ModelUnderTest(const std::string& name, int threads, int block_tokens, DType kv_dtype = DType::kFloat16)
      : config_(*OptConfig::Load(CheckpointPath(name))) {
    backend_ = *CreateCpuBackend({threads, /*pin=*/false});
    weights_ =
        *OptWeights::Load(*Checkpoint::Open(CheckpointPath(name)), config_, Shard::Whole(config_), *backend_, nullptr);
    const int blocks = (config_.context + block_tokens - 1) / block_tokens;
    batch_ = std::make_unique<Batch>(config_.context, config_.context, 1, blocks);
    // Blocks in reverse order: nothing may depend on their lying side by side.
    for (int i = 0; i < blocks; ++i) batch_->block_table[i] = blocks - 1 - i;
    kv_ = *KvCache::Create(*backend_, config_, blocks, block_tokens, kv_dtype, config_.heads);
    predictor_ = *Predictor::Create(nullptr, config_, Shard::Whole(config_), *backend_, batch_->max_rows, 0);
    model_ = *OptModel::Create(config_, Shard::Whole(config_), weights_, *backend_, *communicator_, *predictor_,
                               *batch_, config_.vocab);
  }

  // Logits after each of `tokens`, which stand at `position` and after, in chunks of `chunk`.
  std::vector<float> Run(const std::vector<int32_t>& tokens, int position, int chunk) {
    std::vector<float> logits(tokens.size() * config_.vocab);
    for (size_t done = 0; done < tokens.size(); done += batch_->rows()) {
      batch_->Clear();
      for (size_t i = done; i < std::min(tokens.size(), done + chunk); ++i) {
        batch_->AddRow(0, position + static_cast<int>(i), tokens[i], true);
      }
      model_->Forward(*batch_, kv_, {&logits[done * config_.vocab]});
    }
    return logits;
  }

  const OptConfig& config() const { return config_; }

 private:
  const OptConfig config_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Communicator> communicator_ = SingleRank();
  OptWeights weights_;
  std::unique_ptr<Batch> batch_;
  KvCache kv_;
  std::unique_ptr<Predictor> predictor_;
  std::unique_ptr<OptModel> model_;
};

void ExpectParity(ModelUnderTest& model, const Golden& golden, int chunk) {
  const std::vector<float> logits = model.Run(golden.prompt, 0, chunk);
  ASSERT_EQ(logits.size(), golden.logits.size());
  float largest = 0, error = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    largest = std::max(largest, std::abs(golden.logits[i]));
    const float difference = std::abs(logits[i] - golden.logits[i]);
    error = std::isnan(difference) ? INFINITY : std::max(error, difference);
  }
  EXPECT_LE(error, 1e-3f * largest);

  const int vocab = model.config().vocab;
  std::vector<float> last(logits.end() - vocab, logits.end());
  int position = static_cast<int>(golden.prompt.size());
  for (size_t i = 0; i < golden.greedy.size(); ++i, ++position) {
    const int best = static_cast<int>(std::max_element(last.begin(), last.end()) - last.begin());
    if (golden.margin[i] > 2e-3f) {
      EXPECT_EQ(best, golden.greedy[i]) << "step " << i;
    }
    last = model.Run({golden.greedy[i]}, position, 1);
  }
}

class Parity : public testing::TestWithParam<std::string> {};

TEST_P(Parity, HoldsForEveryChunkBlockThreadCountAndTarget) {
  const std::vector<Golden> goldens = LoadGoldens(GetParam());
  for (const HighwayTarget& target : HighwayTargets()) {
    const ForceHighwayTarget force(target);
    for (int threads : {1, 2}) {
      for (int block_tokens : {1, 16}) {
        ModelUnderTest model(GetParam(), threads, block_tokens);
        for (int chunk : {1, 3, 16, 1 << 20}) {
          for (size_t k = 0; k < goldens.size(); ++k) {
            SCOPED_TRACE(testing::Message() << target.name << ", " << threads << " threads, blocks of " << block_tokens
                                            << ", chunks of " << chunk << ", prompt " << k);
            ExpectParity(model, goldens[k], chunk);
          }
        }
      }
    }
  }
}

// The promise of kernels/backend.h, for the whole model: not one bit depends on how the work was cut.
TEST_P(Parity, LogitsAreBitwiseTheSameHoweverTheWorkIsCut) {
  const std::vector<int32_t> prompt = LoadGoldens(GetParam())[2].prompt;
  for (const HighwayTarget& target : HighwayTargets()) {
    const ForceHighwayTarget force(target);
    const std::vector<float> expected = ModelUnderTest(GetParam(), 1, 16).Run(prompt, 0, 1);
    for (int threads : {1, 2, 3}) {
      for (int block_tokens : {1, 5, 16}) {
        ModelUnderTest model(GetParam(), threads, block_tokens);
        for (int chunk : {2, 5, 16, 1 << 20}) {
          EXPECT_EQ(model.Run(prompt, 0, chunk), expected)
              << target.name << ", " << threads << " threads, blocks of " << block_tokens << ", chunks of " << chunk;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllForms, Parity, testing::ValuesIn(GoldenCheckpoints()), [](const auto& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

}  // namespace
}  // namespace dejavu
