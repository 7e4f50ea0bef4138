// The engine through its public interface, with real models.
#include "engine/engine.h"

#include <algorithm>
#include <cmath>
#include <latch>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/check.h"
#include "tests/engine/golden.h"
#include "tests/engine/serving/collecting_sink.h"
#include "tests/engine/tiny_checkpoint.h"

namespace dejavu {
namespace {

using std::chrono::steady_clock;

std::unique_ptr<Engine> MakeEngine(const std::string& model, EngineOptions options = {}) {
  options.model = model;
  options.device = "cpu";
  options.threads = options.threads == 0 ? 2 : options.threads;
  options.pin_threads = false;
  auto engine = Engine::Create(options, 0, nullptr);
  CHECK(engine.ok()) << engine.status().ToString();
  return *std::move(engine);
}

Request Prompt(std::vector<int32_t> ids, int max_new_tokens) {
  Request request;
  request.prompt = std::move(ids);
  request.max_new_tokens = max_new_tokens;
  request.ignore_eos = true;
  return request;
}

struct Result {
  std::vector<int32_t> ids;
  Finish finish;
};
Result Generate(Engine& engine, Request request) {
  auto sink = std::make_shared<CollectingSink>();
  const auto id = engine.Submit(std::move(request), sink);
  CHECK(id.ok()) << id.status().ToString();
  const Finish finish = sink->WaitForFinish();
  return {sink->ids(), finish};
}

void ExpectIdle(Engine& engine) {
  ASSERT_TRUE(engine.WaitIdle(SteadyTime::max()));
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.kv_blocks_free, stats.kv_blocks_total);
  EXPECT_EQ(stats.running, 0);
  EXPECT_EQ(stats.waiting, 0);
}

// Request i of a mix of lengths, seeds and sampling methods.
Request Mixed(int i, int vocab) {
  std::mt19937 random(i);
  std::vector<int32_t> prompt = {2};
  for (int n = 1 + i * 7 % 60; n > 0; --n) prompt.push_back(4 + static_cast<int32_t>(random() % (vocab - 4)));
  Request request = Prompt(std::move(prompt), 5 + i * 5 % 40);
  request.sampling.temperature = i % 4 == 0 ? 0.0f : 0.5f + 0.1f * static_cast<float>(i);
  request.sampling.seed = 1000 + i;
  request.sampling.top_k = i % 3 == 0 ? 50 : 0;
  request.sampling.top_p = i % 2 == 0 ? 0.9f : 1.0f;
  request.sampling.repetition_penalty = i % 5 == 0 ? 1.2f : 1.0f;
  return request;
}

class EngineGolden : public testing::TestWithParam<std::string> {};

TEST_P(EngineGolden, ContinuesGreedilyAsTransformersDoes) {
  const auto engine = MakeEngine(CheckpointPath(GetParam()));
  for (const Golden& golden : LoadGoldens(GetParam())) {
    const Result result = Generate(*engine, Prompt(golden.prompt, static_cast<int>(golden.greedy.size())));
    ASSERT_EQ(result.ids.size(), golden.greedy.size());
    for (size_t i = 0; i < golden.greedy.size() && golden.margin[i] > 2e-3f; ++i)
      EXPECT_EQ(result.ids[i], golden.greedy[i]);
    EXPECT_EQ(result.finish.reason, FinishReason::kLength);
  }
}

TEST_P(EngineGolden, ScoresPromptsAsTransformersDoes) {
  EngineOptions options;
  options.scheduler.prefill_chunk_tokens = 5;
  const auto engine = MakeEngine(CheckpointPath(GetParam()), options);
  const int vocab = engine->model().vocab;
  for (const Golden& golden : LoadGoldens(GetParam())) {
    Request request = Prompt(golden.prompt, 0);
    request.score = true;
    request.score_top_logprobs = 4;
    auto sink = std::make_shared<CollectingSink>();
    ASSERT_TRUE(engine->Submit(request, sink).ok());
    EXPECT_EQ(sink->WaitForFinish().reason, FinishReason::kLength);
    const auto tokens = sink->tokens();
    ASSERT_EQ(tokens.size(), golden.prompt.size());
    EXPECT_FALSE(tokens[0].has_logprob);
    for (size_t t = 0; t < tokens.size(); ++t) {
      EXPECT_EQ(tokens[t].id, golden.prompt[t]);
      std::vector<float> logits(&golden.logits[t * vocab], &golden.logits[(t + 1) * vocab]);
      const float best = *std::max_element(logits.begin(), logits.end());
      double total = 0;
      for (float x : logits) total += std::exp(x - best);
      const auto logprob = [&](int32_t id) { return logits[id] - best - std::log(total); };
      ASSERT_EQ(tokens[t].top.size(), 4u);
      for (const TokenLogprob& top : tokens[t].top) EXPECT_NEAR(top.logprob, logprob(top.id), 5e-3);
      EXPECT_NEAR(tokens[t].top[0].logprob,
                  logprob(static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin())), 5e-3);
      if (t + 1 < tokens.size()) {
        EXPECT_TRUE(tokens[t + 1].has_logprob);
        EXPECT_NEAR(tokens[t + 1].logprob, logprob(golden.prompt[t + 1]), 5e-3);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllForms, EngineGolden, testing::ValuesIn(GoldenCheckpoints()), [](const auto& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST(Engine, SixteenRequestsTogetherGetWhatEachGetsAlone) {
  const auto engine = MakeEngine(EMBEDDED_MODEL);
  constexpr int kRequests = 16;
  std::vector<std::vector<int32_t>> alone;
  alone.reserve(kRequests);
  for (int i = 0; i < kRequests; ++i) alone.push_back(Generate(*engine, Mixed(i, engine->model().vocab)).ids);

  for (int prefill_chunk : {3, 64}) {
    EngineOptions options;
    options.scheduler.prefill_chunk_tokens = prefill_chunk;
    options.scheduler.max_step_tokens = 40;
    const auto shared = MakeEngine(EMBEDDED_MODEL, options);
    std::vector<std::shared_ptr<CollectingSink>> sinks;
    for (int i = 0; i < kRequests; ++i) {
      sinks.push_back(std::make_shared<CollectingSink>());
      ASSERT_TRUE(shared->Submit(Mixed(i, engine->model().vocab), sinks.back()).ok());
    }
    for (int i = 0; i < kRequests; ++i) {
      sinks[i]->WaitForFinish();
      EXPECT_EQ(sinks[i]->ids(), alone[i]) << "request " << i;
    }
    ExpectIdle(*shared);
  }
}

TEST(Engine, TwoHundredCancellationsAtRandomMomentsLeaveNothingBehind) {
  const auto engine = MakeEngine(EMBEDDED_MODEL);
  std::mt19937 random(5);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (int i = 0; i < 200; ++i) {
    sinks.push_back(std::make_shared<CollectingSink>());
    Request request = Mixed(i % 40, engine->model().vocab);
    request.max_new_tokens = 440;
    const auto id = engine->Submit(request, sinks.back());
    ASSERT_TRUE(id.ok()) << id.status();
    // Queued, in prefill, or after some tokens, of this request or of one before it.
    if (const auto after = random() % 4; after > 0) sinks[random() % sinks.size()]->WaitForTokens(after);
    engine->Cancel(*id);
  }
  for (const auto& sink : sinks) EXPECT_EQ(sink->WaitForFinish().reason, FinishReason::kCancelled);
  ExpectIdle(*engine);
  const Result after = Generate(*engine, Mixed(3, engine->model().vocab));
  EXPECT_EQ(after.finish.reason, FinishReason::kLength);
}

TEST(Engine, ADeadlineEndsARequestInMidStream) {
  EngineOptions options;
  options.admission.deadline_slack = 0.0;  // or it would not be let in
  const auto engine = MakeEngine(EMBEDDED_MODEL, options);
  auto sink = std::make_shared<CollectingSink>();
  Request request = Prompt({2, 100}, 500);
  request.deadline = steady_clock::now() + std::chrono::milliseconds(5);
  ASSERT_TRUE(engine->Submit(request, sink).ok());
  const Finish finish = sink->WaitForFinish();
  EXPECT_EQ(finish.reason, FinishReason::kDeadline);
  EXPECT_LT(finish.generated_tokens, 500);
  ExpectIdle(*engine);
}

TEST(Engine, ASinkThatReturnsFalseEndsItsRequestOnly) {
  const auto engine = MakeEngine(EMBEDDED_MODEL);
  auto quitter = std::make_shared<CollectingSink>([](size_t tokens) { return tokens < 3; });
  auto other = std::make_shared<CollectingSink>();
  ASSERT_TRUE(engine->Submit(Prompt({2, 5}, 50), quitter).ok());
  ASSERT_TRUE(engine->Submit(Prompt({2, 6}, 20), other).ok());
  EXPECT_EQ(quitter->WaitForFinish().reason, FinishReason::kSink);
  EXPECT_EQ(quitter->ids().size(), 3u);
  EXPECT_EQ(other->WaitForFinish().reason, FinishReason::kLength);
  ExpectIdle(*engine);
}

TEST(Engine, StopTokensAndTheEndTokenEndARequestUnlessTooEarly) {
  const auto engine = MakeEngine(EMBEDDED_MODEL);
  const std::vector<int32_t> free_run = Generate(*engine, Prompt({2, 50, 60}, 12)).ids;

  Request stopping = Prompt({2, 50, 60}, 12);
  stopping.stop_token_ids = {free_run[4]};
  const size_t first = std::find(free_run.begin(), free_run.end(), free_run[4]) - free_run.begin();
  const Result stopped = Generate(*engine, stopping);
  EXPECT_EQ(stopped.finish.reason, FinishReason::kStopToken);
  EXPECT_EQ(stopped.finish.stop_token_id, free_run[4]);
  EXPECT_EQ(stopped.ids, std::vector<int32_t>(free_run.begin(), free_run.begin() + first + 1));

  stopping.min_new_tokens = 12;
  const Result late = Generate(*engine, stopping);
  EXPECT_EQ(late.finish.reason, FinishReason::kLength);
  EXPECT_THAT(late.ids, testing::Not(testing::Contains(free_run[4])));

  // Make the end token the best one.
  Request ending = Prompt({2, 50, 60}, 12);
  ending.sampling.logit_bias = {{engine->model().eos_tokens[0], 100.0f}};
  EXPECT_EQ(Generate(*engine, ending).finish.reason, FinishReason::kLength);
  ending.ignore_eos = false;
  const Result ended = Generate(*engine, ending);
  EXPECT_EQ(ended.finish.reason, FinishReason::kEos);
  EXPECT_EQ(ended.ids, engine->model().eos_tokens);
  ending.min_new_tokens = 4;
  EXPECT_EQ(Generate(*engine, ending).ids.size(), 5u);
}

TEST(Engine, ReportsLogprobsRanksAndAlternatives) {
  const auto engine = MakeEngine(EMBEDDED_MODEL);
  auto sink = std::make_shared<CollectingSink>();
  Request request = Prompt({2, 50, 60}, 6);
  request.logprobs = true;
  request.top_logprobs = 3;
  ASSERT_TRUE(engine->Submit(request, sink).ok());
  sink->WaitForFinish();
  for (const auto& token : sink->tokens()) {
    EXPECT_TRUE(token.has_logprob);
    EXPECT_EQ(token.rank, 1) << "greedy";
    ASSERT_EQ(token.top.size(), 3u);
    EXPECT_EQ(token.top[0].id, token.id);
    EXPECT_EQ(token.top[0].logprob, token.logprob);
    EXPECT_GE(token.top[1].logprob, token.top[2].logprob);
  }
}

TEST(Engine, ComputesAPromptAndGeneratesNothing) {
  const auto engine = MakeEngine(EMBEDDED_MODEL);
  std::vector<int32_t> prompt = {2};
  while (prompt.size() < 100) prompt.push_back(5 + static_cast<int32_t>(prompt.size()));
  const Result alone = Generate(*engine, Prompt(prompt, 0));
  EXPECT_EQ(alone.finish.reason, FinishReason::kLength);
  EXPECT_TRUE(alone.ids.empty());
  EXPECT_EQ(alone.finish.generated_tokens, 0);
  EXPECT_GT(Generate(*engine, Prompt(prompt, 1)).finish.cached_prompt_tokens, 0);
  ExpectIdle(*engine);
}

TEST(Engine, RefusesRequestsThatCanNeverRun) {
  const auto engine = MakeEngine(EMBEDDED_MODEL);
  const auto code = [&](Request request) {
    return engine->Submit(std::move(request), std::make_shared<CollectingSink>()).status().code();
  };
  const int context = engine->model().context, vocab = engine->model().vocab;
  EXPECT_EQ(code(Prompt({}, 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Prompt({vocab}, 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Prompt({-1}, 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Prompt({2}, -1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Prompt(std::vector<int32_t>(context + 1, 5), 1)), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Prompt(std::vector<int32_t>(context, 5), 2)), absl::StatusCode::kInvalidArgument);
  Request outside = Prompt({2}, 1);
  outside.sampling.allowed_token_ids = {vocab};
  EXPECT_EQ(code(outside), absl::StatusCode::kInvalidArgument);
  ExpectIdle(*engine);
}

// Every position of the context may be read; what it says comes next takes none.
TEST(Engine, FillsTheContextAndSaysWhatComesNext) {
  EngineOptions options;
  for (const bool overcommit : {false, true}) {
    options.scheduler.overcommit = overcommit;
    const auto engine = MakeEngine(EMBEDDED_MODEL, options);
    const int context = engine->model().context;
    std::vector<int32_t> prompt;
    for (int i = 0; i < context; ++i) prompt.push_back(5 + i % 700);
    const auto full = Generate(*engine, Prompt(prompt, 1));
    EXPECT_EQ(full.finish.reason, FinishReason::kLength);
    ASSERT_EQ(full.ids.size(), 1u);
    Request score = Prompt(prompt, 0);
    score.score = true;
    score.score_top_logprobs = 1;
    auto scored = std::make_shared<CollectingSink>();
    ASSERT_TRUE(engine->Submit(score, scored).ok());
    scored->WaitForFinish();
    EXPECT_EQ(full.ids[0], scored->tokens().back().top[0].id);
    prompt.resize(static_cast<size_t>(context) - 20);
    EXPECT_EQ(Generate(*engine, Prompt(prompt, 21)).ids.size(), 21u);
    ExpectIdle(*engine);
  }
}

TEST(Engine, RefusesBeyondItsQueueAndWhileDraining) {
  EngineOptions options;
  options.scheduler.max_batch = 1;
  options.admission.max_waiting_requests = 2;
  const auto engine = MakeEngine(EMBEDDED_MODEL, options);
  std::latch go_on{1};
  auto running = std::make_shared<CollectingSink>([&](size_t count) {
    if (count == 1) go_on.wait();
    return true;
  });
  ASSERT_TRUE(engine->Submit(Prompt({2}, 400), running).ok());
  running->WaitForTokens(1);
  auto waiting = std::make_shared<CollectingSink>();
  EXPECT_TRUE(engine->Submit(Prompt({2}, 1), waiting).ok());
  EXPECT_TRUE(engine->Submit(Prompt({2}, 1), waiting).ok());
  const auto refused = engine->Submit(Prompt({2}, 1), std::make_shared<CollectingSink>());
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  engine->Drain(/*refuse_waiting=*/false);
  EXPECT_EQ(engine->Submit(Prompt({2}, 1), waiting).status().code(), absl::StatusCode::kUnavailable);
  go_on.count_down();
  EXPECT_EQ(running->WaitForFinish().reason, FinishReason::kLength);
  ExpectIdle(*engine);
}

TEST(Engine, FinishesEverythingWhenItIsDestroyed) {
  EngineOptions options;
  options.scheduler.max_batch = 1;
  auto engine = MakeEngine(EMBEDDED_MODEL, options);
  auto running = std::make_shared<CollectingSink>(TakesItsTime), waiting = std::make_shared<CollectingSink>();
  ASSERT_TRUE(engine->Submit(Prompt({2}, 500), running).ok());
  ASSERT_TRUE(engine->Submit(Prompt({2}, 500), waiting).ok());
  running->WaitForTokens(1);
  engine.reset();
  EXPECT_EQ(running->WaitForFinish().reason, FinishReason::kShutdown);
  EXPECT_EQ(waiting->WaitForFinish().reason, FinishReason::kShutdown);
}

// The sum over the embedding of token 7 overflows float32 in the first norm: only the request that holds it is lost.
TEST(Engine, LogitsThatAreNotFiniteEndTheirOwnRequestOnly) {
  TinyCheckpoint tiny = TinyCheckpoint::Random(9);
  auto& embedding = tiny.tensors.at("model.decoder.embed_tokens.weight").data;
  std::fill(&embedding[7 * 16], &embedding[8 * 16], 3e37f);
  const ScratchDirectory directory;
  tiny.Write(directory);
  const auto engine = MakeEngine(directory.path());
  auto poisoned = std::make_shared<CollectingSink>();
  auto healthy = std::make_shared<CollectingSink>();
  Request request = Prompt({2, 3, 4}, 20);
  for (int32_t id = 0; id < 50; ++id) {
    if (id != 7) request.sampling.allowed_token_ids.push_back(id);
  }
  const std::vector<int32_t> alone = Generate(*engine, request).ids;
  ASSERT_TRUE(engine->Submit(request, healthy).ok());
  ASSERT_TRUE(engine->Submit(Prompt({2, 7, 4}, 20), poisoned).ok());
  const Finish finish = poisoned->WaitForFinish();
  EXPECT_EQ(finish.reason, FinishReason::kError);
  EXPECT_EQ(finish.status.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(healthy->WaitForFinish().reason, FinishReason::kLength);
  EXPECT_EQ(healthy->ids(), alone);
  ExpectIdle(*engine);
}

TEST(Engine, AnExceptionInItsThreadFailsItVisibly) {
  const auto engine = MakeEngine(EMBEDDED_MODEL);
  auto thrower = std::make_shared<CollectingSink>([](size_t) -> bool { throw std::runtime_error("a bug of ours"); });
  auto other = std::make_shared<CollectingSink>(TakesItsTime);
  ASSERT_TRUE(engine->Submit(Prompt({2}, 500), other).ok());
  other->WaitForTokens(1);
  ASSERT_TRUE(engine->Submit(Prompt({2}, 500), thrower).ok());
  EXPECT_EQ(other->WaitForFinish().status.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(thrower->WaitForFinish().reason, FinishReason::kError);
  EXPECT_TRUE(engine->failed());
  EXPECT_EQ(engine->Submit(Prompt({2}, 1), other).status().code(), absl::StatusCode::kUnavailable);
}

TEST(Engine, AModelThatTheDeviceCannotHoldIsRefusedBeforeItIsLoaded) {
  EngineOptions options;
  options.model = EMBEDDED_MODEL;
  options.device = "cpu";
  options.memory_share = 1e-6;
  bool loaded = false;
  const auto engine = Engine::Create(options, 0, [&](int64_t, int64_t) { return loaded = true; });
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(engine.status().message()), testing::HasSubstr("weights 0.0"));
  EXPECT_FALSE(loaded);
  options.memory_share = 0.0;
  EXPECT_EQ(Engine::Create(options, 0, nullptr).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Engine, MemoryForTheCacheIsRefusedWithTheFiguresWhenTooSmall) {
  EngineOptions options;
  options.model = EMBEDDED_MODEL;
  options.kv.memory_mib = 1;
  const auto engine = Engine::Create(options, 0, nullptr);
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(engine.status().message()), testing::HasSubstr("512 tokens"));
}

}  // namespace
}  // namespace dejavu
