// StepRunner: one model, driven step by step, for tests that compare the logits of steps bit by bit.
#ifndef TESTS_ENGINE_MODEL_STEP_RUNNER_H_
#define TESTS_ENGINE_MODEL_STEP_RUNNER_H_

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/ranks/model_runner.h"
#include "kernels/base/check.h"

namespace dejavu {

inline constexpr Tier kPredictedTiers[] = {Tier::kHigh, Tier::kBalanced, Tier::kFast};

struct StepRow {
  int32_t slot, position, token;
  Tier tier = Tier::kDense;
  bool deterministic = false;
  bool decodes = true;
};

class StepRunner {
 public:
  explicit StepRunner(const std::string& model, int slots = 1, int threads = 2) {
    ModelRunner::Options options;
    options.model = model;
    options.threads = threads;
    options.slots = slots;
    options.max_audits = 8;
    options.window = std::min(128, OptConfig::Load(model).value().context);
    runner_ = ModelRunner::Create(options, nullptr).value();
  }
  ModelRunner* operator->() { return runner_.get(); }

  // nullptr: none.
  StepRunner& With(const PredictorData* data) {
    CHECK(runner_->SetPredictor(data).ok());
    return *this;
  }

  // Rows that decode must come first. Returns logits [rows, vocab].
  std::vector<float> Step(const std::vector<StepRow>& rows, const std::vector<int32_t>& audits = {}) {
    Batch& batch = runner_->StartBatch();
    for (const StepRow& row : rows) {
      if (row.decodes) {
        batch.AddDecodeRow(row.slot, row.position, row.token, true, {row.tier, row.deterministic, 0});
      } else {
        batch.AddRow(row.slot, row.position, row.token, true, row.tier);
      }
    }
    batch.audit_rows = audits;
    const absl::Span<const float> logits = runner_->Run();
    return {logits.begin(), logits.end()};
  }

  // Every token decoded in a step of its own; logits [tokens, vocab].
  std::vector<float> Decode(const std::vector<int32_t>& tokens, Tier tier, bool deterministic = false) {
    std::vector<float> all;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const auto logits = Step({{0, static_cast<int32_t>(i), tokens[i], tier, deterministic}});
      all.insert(all.end(), logits.begin(), logits.end());
    }
    return all;
  }

  // Row `row` of the logits of a step or of Decode.
  std::vector<float> At(const std::vector<float>& logits, size_t row) {
    const int32_t vocab = runner_->config().vocab;
    return {logits.begin() + static_cast<ptrdiff_t>(row * vocab),
            logits.begin() + static_cast<ptrdiff_t>((row + 1) * vocab)};
  }

 private:
  std::unique_ptr<ModelRunner> runner_;
};

// How many values differ in their bits.
inline int64_t Differences(const std::vector<float>& a, const std::vector<float>& b) {
  CHECK(a.size() == b.size());
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i]);
  return count;
}

inline std::vector<int32_t> RandomTokens(int32_t count, int32_t vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens = {2};
  while (static_cast<int32_t>(tokens.size()) < count)
    tokens.push_back(4 + static_cast<int32_t>(random() % (vocab - 4)));
  return tokens;
}

}  // namespace dejavu

#endif  // TESTS_ENGINE_MODEL_STEP_RUNNER_H_
