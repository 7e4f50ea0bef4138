#include "served_model.h"

#include <algorithm>
#include <cstdlib>

#include "engine/model/opt_config.h"
#include "module_under_test.h"
#include "tests/engine/made_predictor.h"
#include "tests/engine/random_predictor.h"
#include "tests/engine/serving/collecting_sink.h"

// The loader finds the module in this very program.
extern "C" __attribute__((visibility("default"))) const DejavuCudaModule* DejavuCudaEntry(void) {
  return dejavu::simt::ModuleUnderTest();
}

namespace dejavu {
namespace {

constexpr float kClose = 2e-3f;  // a gap between the two best logits that rounding may close

}  // namespace

EngineOptions ServedOptions(const std::string& checkpoint, const std::string& device, const std::string& predictor,
                            int ranks) {
  setenv("DEJAVU_CUDA_MODULE", "", 1);  // dlopen's name for the program itself
  EngineOptions options;
  options.model = CheckpointPath(checkpoint);
  options.device = device;
  options.predictor = predictor;
  options.tensor_parallel = ranks;
  options.threads = 1;
  options.pin_threads = false;
  options.scheduler.max_batch = 4;
  options.scheduler.max_step_tokens = 32;
  options.scheduler.prefill_share = 1e6;  // what is in a step shall not depend on how long it takes
  options.peer_timeout_s = 100.0;         // nor on who waits for whom
  return options;
}

std::unique_ptr<Engine> MakeEngine(const EngineOptions& options) {
  auto engine = Engine::Create(options, 0, nullptr);
  EXPECT_TRUE(engine.ok()) << engine.status();
  return engine.ok() ? *std::move(engine) : nullptr;
}

std::unique_ptr<Engine> MakeEngine(const std::string& checkpoint, const std::string& device,
                                   const std::string& predictor, int ranks) {
  return MakeEngine(ServedOptions(checkpoint, device, predictor, ranks));
}

std::string WriteRandomPredictor(const std::string& checkpoint, const std::string& path) {
  const std::string model = CheckpointPath(checkpoint);
  return WritePredictorFor(model, RandomPredictor(*OptConfig::Load(model), WeightsHashOf(model), 3), path);
}

Request Greedy(const std::vector<int32_t>& prompt, Tier tier, bool deterministic) {
  Request request;
  request.prompt = prompt;
  request.max_new_tokens = kTokens;
  request.ignore_eos = true;
  request.sparsity.tier = tier;
  request.sparsity.deterministic = deterministic;
  return request;
}

std::vector<std::vector<int32_t>> Generate(Engine& engine, const std::vector<Request>& requests) {
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (const Request& request : requests) {
    sinks.push_back(std::make_shared<CollectingSink>());
    const auto id = engine.Submit(request, sinks.back());
    EXPECT_TRUE(id.ok()) << id.status();
  }
  std::vector<std::vector<int32_t>> ids;
  for (const auto& sink : sinks) {
    const Finish finish = sink->WaitForFinish();
    EXPECT_EQ(finish.reason, FinishReason::kLength) << finish.status;
    ids.push_back(sink->ids());
  }
  return ids;
}

void ExpectGolden(const std::vector<int32_t>& ids, const Golden& golden) {
  ASSERT_EQ(ids.size(), static_cast<size_t>(kTokens));
  ASSERT_GE(golden.greedy.size(), ids.size());
  for (int i = 0; i < kTokens; ++i) {
    if (golden.margin[i] <= kClose) return;
    ASSERT_EQ(ids[i], golden.greedy[i]) << "token " << i;
  }
}

std::string CheckpointTestName(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

}  // namespace dejavu
