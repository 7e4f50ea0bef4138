// Numbers beyond the range of float16 in the cache of keys and values: those that need not be, and those that are
// counted and named.
#include <algorithm>
#include <cmath>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "spdlog/sinks/ostream_sink.h"
#include "spdlog/spdlog.h"
#include "tests/engine/golden.h"
#include "tests/engine/serving/embedded_engine.h"
#include "tests/engine/tiny_checkpoint.h"
#include "tests/scratch_directory.h"

namespace dejavu {
namespace {

constexpr SparsityParams kExactly = {Tier::kExact, false, 0};

std::vector<float>& ValuesOf(TinyCheckpoint& tiny, int layer, const std::string& name) {
  return tiny.tensors.at("model.decoder.layers." + std::to_string(layer) + ".self_attn." + name).data;
}

// A tiny model, served.
class Served {
 public:
  explicit Served(const TinyCheckpoint& tiny, EngineOptions options = {}) {
    tiny.Write(directory_);
    options.model = directory_.path();
    options.kv.block_tokens = 4;
    engine_ = MakeEngine(options);
  }
  Engine* operator->() const { return engine_.get(); }
  Engine& operator*() const { return *engine_; }

 private:
  const ScratchDirectory directory_;
  std::unique_ptr<Engine> engine_;
};

Request Scored(std::vector<int32_t> prompt) {
  Request request = SparseRequest(std::move(prompt), 0, kExactly);
  request.score = true;
  return request;
}

const std::vector<int32_t> kPrompt = {2, 7, 9, 11, 13, 15, 17, 19, 21, 23};

TEST(KeyBias, ChangesNoBitHoweverLargeItIs) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(5);
  for (const char* weights : {"stored", "fp16", "bf16", "int8"}) {
    for (const int ranks : {1, 2}) {
      SCOPED_TRACE(testing::Message() << weights << ", ranks: " << ranks);
      EngineOptions options;
      options.weights = weights;
      options.tensor_parallel = ranks;
      const Served usual(tiny, options);
      TinyCheckpoint biased = tiny;
      for (int layer = 0; layer < 2; ++layer) {
        std::vector<float>& bias = ValuesOf(biased, layer, "k_proj.bias");
        for (size_t i = 0; i < bias.size(); ++i) bias[i] += i % 3 == 0 ? -3e38f : 1e5f;
      }
      const Served served(biased, options);
      for (const Request& request : {SparseRequest(kPrompt, 12, kExactly), Scored(kPrompt)}) {
        const Heard heard = Generate(*served, request);
        ExpectSameBits(heard, Generate(*usual, request));
        EXPECT_EQ(heard.finish.saturated_kv_values, 0);
      }
    }
  }
}

// Keys of 1e5 and 1e-1 side by side, against Transformers in float64.
class KeyBiasGolden : public testing::TestWithParam<std::pair<std::string, double>> {};  // kv.dtype, tolerance

TEST_P(KeyBiasGolden, GivesWhatTransformersGives) {
  const auto& [dtype, tolerance] = GetParam();
  EngineOptions options;
  options.model = CheckpointPath("large-key-bias");
  options.kv.dtype = dtype;
  const auto engine = MakeEngine(options);
  const int32_t vocab = engine->model().vocab;
  for (const Golden& golden : LoadGoldens("large-key-bias")) {
    const Heard greedy =
        Generate(*engine, SparseRequest(golden.prompt, static_cast<int>(golden.greedy.size()), kExactly));
    EXPECT_EQ(greedy.finish.saturated_kv_values, 0);
    for (size_t i = 0; i < golden.greedy.size() && golden.margin[i] > static_cast<float>(2 * tolerance); ++i) {
      EXPECT_EQ(greedy.ids[i], golden.greedy[i]) << i;
    }
    const Heard scored = Generate(*engine, Scored(golden.prompt));
    for (size_t t = 1; t < golden.prompt.size(); ++t) {
      const float* logits = &golden.logits[(t - 1) * vocab];
      double total = 0.0;
      for (int32_t id = 0; id < vocab; ++id) total += std::exp(double{logits[id]});
      EXPECT_NEAR(scored.logprobs[t], logits[golden.prompt[t]] - std::log(total), tolerance) << t;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Caches, KeyBiasGolden, testing::Values(std::pair("fp32", 1e-4), std::pair("fp16", 5e-3)),
                         [](const auto& info) { return info.param.first; });

// Of each position, three values of the last layer.
TinyCheckpoint WithLargeValues() {
  TinyCheckpoint tiny = TinyCheckpoint::Random(6);
  std::vector<float>& bias = ValuesOf(tiny, 1, "v_proj.bias");
  bias[1] = bias[15] = 1e5f;
  bias[7] = -1e6f;
  return tiny;
}
constexpr int64_t kOfPosition = 3;

// The last token's keys and values are not computed.
int64_t SaturatedOf(const Request& request) {
  return kOfPosition * (static_cast<int64_t>(request.prompt.size()) + std::max(0, request.max_new_tokens - 1));
}

TEST(Saturation, IsNamedInEachAnswerAndCounted) {
  for (const int ranks : {1, 2}) {
    EngineOptions options;
    options.tensor_parallel = ranks;
    options.scheduler.prefill_chunk_tokens = 3;
    const Served served(WithLargeValues(), options);
    std::vector<Request> requests;
    for (int i = 1; i < 10; ++i) {
      requests.push_back(SparseRequest(std::vector<int32_t>(i, 10 + i), 3 * i % 11 + 1, {kAllTiers[i % 2], false, 0}));
    }
    requests.push_back(Scored(kPrompt));
    int64_t all = 0;
    const std::vector<Heard> heard = GenerateTogether(*served, requests);
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(heard[i].finish.saturated_kv_values, SaturatedOf(requests[i])) << i;
      all += SaturatedOf(requests[i]);
    }
    EXPECT_EQ(served->metrics().kv_saturated_values.value(), all + kOfPosition) << "and those of the gate";
  }
}

TEST(Saturation, IsNamedWhereThePrefixCacheHadTheKeysAndValues) {
  const Served served(WithLargeValues());
  const Request request = SparseRequest(kPrompt, 4, kExactly);
  EXPECT_EQ(Generate(*served, request).finish.saturated_kv_values, SaturatedOf(request));
  const Heard again = Generate(*served, request);
  EXPECT_EQ(again.finish.cached_prompt_tokens, 8);
  EXPECT_EQ(again.finish.saturated_kv_values, SaturatedOf(request));
  EXPECT_EQ(served->metrics().kv_saturated_values.value(), 2 * SaturatedOf(request) - 8 * kOfPosition);
}

TEST(Saturation, OfASequenceThatIsComputedAgainCountsOnce) {
  EngineOptions options;
  options.scheduler.overcommit = true;
  options.kv.dtype = "fp16";
  options.kv.memory_mib = 1;  // 8192 positions of a model this small; 700 sequences want up to 22400
  options.scheduler.max_batch = 700;
  options.scheduler.max_step_tokens = 700;
  options.admission.max_waiting_requests = 1000;
  const Served served(WithLargeValues(), options);
  std::vector<Request> requests(700, SparseRequest({2, 5}, 30, kExactly));
  for (size_t i = 0; i < requests.size(); ++i) requests[i].prompt[1] = static_cast<int32_t>(4 + i % 40);
  for (const Heard& heard : GenerateTogether(*served, requests)) {
    EXPECT_EQ(heard.finish.saturated_kv_values, SaturatedOf(requests[0]));
  }
  EXPECT_GT(served->stats().preemptions, 0) << "there was memory for all of them";
}

TEST(Saturation, AFloat32CacheHasNone) {
  EngineOptions options;
  options.kv.dtype = "fp32";
  const Served served(WithLargeValues(), options);
  EXPECT_EQ(Generate(*served, SparseRequest(kPrompt, 4, kExactly)).finish.saturated_kv_values, 0);
  EXPECT_EQ(served->metrics().kv_saturated_values.value(), 0);
}

TEST(Saturation, KeysAreCountedAsValuesAre) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(7);
  for (float& weight : ValuesOf(tiny, 0, "k_proj.weight")) weight *= 1e8f;
  const Served served(tiny);
  const Heard heard = Generate(*served, SparseRequest(kPrompt, 4, kExactly));
  EXPECT_GT(heard.finish.saturated_kv_values, 100);
  EXPECT_LE(heard.finish.saturated_kv_values, 13 * 16);
}

TEST(Saturation, IsWarnedOfOnce) {
  std::ostringstream log;
  const auto usual = spdlog::default_logger();
  spdlog::set_default_logger(
      std::make_shared<spdlog::logger>("", std::make_shared<spdlog::sinks::ostream_sink_mt>(log)));
  {
    const Served served(WithLargeValues());
    for (int i = 0; i < 3; ++i) Generate(*served, SparseRequest(kPrompt, 4, kExactly));
  }
  spdlog::set_default_logger(usual);
  const std::string text = log.str(), said = "beyond the range of kv.dtype fp16";
  const size_t first = text.find(said);
  ASSERT_NE(first, std::string::npos) << text;
  EXPECT_EQ(text.find(said, first + 1), std::string::npos) << text;
}

}  // namespace
}  // namespace dejavu
