// An engine without a model, for what the server does around one. A request ends at once, with `finish`.
#ifndef TESTS_SERVER_FAKE_ENGINE_H_
#define TESTS_SERVER_FAKE_ENGINE_H_

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"

namespace dejavu {

class FakeEngine final : public Engine {
 public:
  FakeEngine() {
    config.vocab = 100;
    config.context = 64;
    finish.reason = FinishReason::kLength;
  }

  // What it says; set by the test.
  ModelShape config;
  PredictorInfo predictor_info;
  std::string synthetic_description;
  EngineStats stats_of_engine;
  SparsityStats stats_of_sparsity;
  EngineMetrics counted{*MetricEdgesFrom("")};
  Finish finish;
  StepTrace steps;
  // What it heard.
  Request request;
  std::array<int, kRefusals> refused = {};

  const ModelShape& model() const override { return config; }
  std::string backend_description() const override { return "fake"; }
  int64_t weight_bytes() const override { return 0; }
  int64_t draft_weight_bytes() const override { return 0; }
  const char* weight_type() const override { return "float32"; }
  const PredictorInfo& predictor() const override { return predictor_info; }
  const std::string& synthetic() const override { return synthetic_description; }
  absl::Status CheckTier(Tier tier) const override {
    const auto& tiers = predictor_info.tiers;
    if (!IsPredicted(tier) || std::find(tiers.begin(), tiers.end(), tier) != tiers.end()) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat("the test predicts nothing for tier ", Name(tier)));
  }
  absl::StatusOr<uint64_t> SubmitSamples(Request submitted, std::vector<std::shared_ptr<TokenSink>> sinks) override {
    request = std::move(submitted);
    for (const auto& sink : sinks) sink->OnFinish(finish);
    return 1;
  }
  void CountRefused(Refusal reason, int samples) override { refused[static_cast<size_t>(reason)] += samples; }
  void Cancel(uint64_t /*id*/) override {}
  void Drain(bool /*refuse_waiting*/) override {}
  bool WaitIdle(SteadyTime /*deadline*/) override { return true; }
  absl::Status ReloadPredictor() override { return absl::UnimplementedError("the test has none"); }
  const StepTrace& trace() const override { return steps; }
  EngineStats stats() const override { return stats_of_engine; }
  SparsityStats sparsity_stats() const override { return stats_of_sparsity; }
  void SetCounting(bool) override {}
  const EngineMetrics& metrics() const override { return counted; }
  bool failed() const override { return false; }
};

}  // namespace dejavu

#endif  // TESTS_SERVER_FAKE_ENGINE_H_
