#include "tests/engine/serving/embedded_engine.h"

#include <algorithm>
#include <bit>
#include <fstream>
#include <iterator>
#include <optional>
#include <utility>

#include "engine/text/tokenizer.h"
#include "gtest/gtest.h"
#include "kernels/base/check.h"

namespace dejavu {

std::unique_ptr<Engine> MakeEngine(EngineOptions options) {
  if (options.model.empty()) options.model = EMBEDDED_MODEL;
  options.device = "cpu";
  options.threads = 2;
  options.pin_threads = false;
  // What is in a step must not depend on how long it takes.
  options.scheduler.prefill_share = 1e6;
  options.scheduler.ageing_s = 1e6;
  auto engine = Engine::Create(options, 0, nullptr);
  CHECK(engine.ok()) << engine.status().ToString();
  return *std::move(engine);
}

EngineOptions WithoutFallback() {
  EngineOptions options;
  options.shadow_fallback = false;
  return options;
}

EngineOptions WithPredictor(const std::string& path) {
  EngineOptions options;
  options.predictor = path;
  return options;
}

const std::vector<std::vector<int32_t>>& TextPrompts() {
  static const auto* const kPrompts = [] {
    std::ifstream file(std::string(TESTDATA) + "/text/prompts.txt", std::ios::binary);
    const std::string text(std::istreambuf_iterator<char>(file), {});
    CHECK(text.size() > 40000) << text.size() << " bytes of text";
    const auto tokenizer = Tokenizer::Load(EMBEDDED_MODEL).value();
    auto* prompts = new std::vector<std::vector<int32_t>>;
    for (size_t i = 0; i < 100; ++i) {
      const size_t first = text.find(' ', i * (text.size() / 100)) + 1;
      const size_t last = text.find(' ', first + 40 + 4 * (i * 37 % 100));
      prompts->push_back(tokenizer->EncodePrompt(text.substr(first, last - first)));
    }
    return prompts;
  }();
  return *kPrompts;
}

Request SparseRequest(std::vector<int32_t> prompt, int max_new_tokens, const SparsityParams& sparsity) {
  Request request;
  request.prompt = std::move(prompt);
  request.max_new_tokens = max_new_tokens;
  request.sparsity = sparsity;
  request.ignore_eos = true;
  request.logprobs = true;
  return request;
}

Heard Listen(CollectingSink& sink) {
  Heard heard;
  heard.finish = sink.WaitForFinish();
  for (const auto& token : sink.tokens()) {
    heard.ids.push_back(token.id);
    heard.logprobs.push_back(token.logprob);
  }
  return heard;
}

Heard Generate(Engine& engine, Request request) { return GenerateTogether(engine, {std::move(request)})[0]; }

HeldEngine::HeldEngine(Engine& engine)
    : gate_(std::make_shared<CollectingSink>([this](size_t) {
        all_there_.wait();
        return true;
      })) {
  CHECK(engine.Submit(SparseRequest({2}, 1, {Tier::kDense, false, 0}), gate_).ok());
  gate_->WaitForTokens(1);
}

void HeldEngine::LetGo() {
  all_there_.count_down();
  gate_->WaitForFinish();
}

std::vector<Heard> GenerateTogether(Engine& engine, const std::vector<Request>& requests) {
  std::optional<HeldEngine> held;
  if (requests.size() > 1) held.emplace(engine);
  std::vector<std::shared_ptr<CollectingSink>> sinks;
  for (const Request& request : requests) {
    sinks.push_back(std::make_shared<CollectingSink>());
    const auto id = engine.Submit(request, sinks.back());
    CHECK(id.ok()) << id.status().ToString();
  }
  if (held.has_value()) held->LetGo();
  std::vector<Heard> heard;
  heard.reserve(sinks.size());
  for (const auto& sink : sinks) heard.push_back(Listen(*sink));
  return heard;
}

void ExpectSameBits(const Heard& a, const Heard& b) {
  EXPECT_EQ(a.ids, b.ids);
  ASSERT_EQ(a.logprobs.size(), b.logprobs.size());
  for (size_t i = 0; i < a.logprobs.size(); ++i) {
    EXPECT_EQ(std::bit_cast<uint32_t>(a.logprobs[i]), std::bit_cast<uint32_t>(b.logprobs[i])) << "token " << i;
  }
}

std::vector<std::vector<Got>> WaitForAll(const std::vector<std::vector<std::shared_ptr<TokenSink>>>& sinks) {
  std::vector<std::vector<Got>> got;
  for (const auto& samples : sinks) {
    got.emplace_back();
    for (const auto& sink : samples) {
      auto& collecting = static_cast<CollectingSink&>(*sink);
      const Finish finish = collecting.WaitForFinish();
      got.back().push_back({collecting.tokens(), finish});
    }
  }
  return got;
}

void ExpectSameToken(const CollectingSink::HeardToken& got, const CollectingSink::HeardToken& want) {
  const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
  EXPECT_EQ(got.id, want.id);
  EXPECT_EQ(got.has_logprob, want.has_logprob);
  EXPECT_EQ(bits(got.logprob), bits(want.logprob));
  EXPECT_EQ(got.rank, want.rank);
  EXPECT_EQ(got.stop, want.stop);
  ASSERT_EQ(got.top.size(), want.top.size());
  for (size_t i = 0; i < got.top.size(); ++i) {
    EXPECT_EQ(got.top[i].id, want.top[i].id);
    EXPECT_EQ(bits(got.top[i].logprob), bits(want.top[i].logprob));
  }
}

}  // namespace dejavu
