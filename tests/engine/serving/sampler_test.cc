#include "engine/serving/sampler.h"

#include <array>
#include <cmath>
#include <limits>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/draw.h"

namespace dejavu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> RandomLogits(int vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> logits(vocab);
  for (float& x : logits) x = normal(random);
  return logits;
}

// How often each id is drawn in `draws` steps.
std::vector<int> Histogram(const std::vector<float>& logits, const SamplingParams& params, int draws) {
  const int vocab = static_cast<int>(logits.size());
  Sampler sampler(vocab, vocab);
  const TokenCounts counts(vocab);
  std::vector<int> histogram(vocab);
  for (int step = 0; step < draws; ++step)
    ++histogram[sampler.Sample(logits.data(), params, counts, {}, step, false).id];
  return histogram;
}

TEST(Sampler, GreedyTakesTheBestAndTheLowestIdOfEquals) {
  Sampler sampler(4, 4);
  const std::vector<float> logits = {1, 5, 5, 2};
  EXPECT_EQ(sampler.Sample(logits.data(), {}, TokenCounts(4), {}, 0, false).id, 1);
}

// Backend::Draw, where the sampler is not asked: the same tokens.
TEST(Sampler, ADeviceDrawsWhatTheSamplerDraws) {
  constexpr int kVocab = 5000, kKnown = 4990, kRows = 40;
  const auto backend = *CreateCpuBackend({2, /*pin=*/false});
  Sampler sampler(kVocab, kKnown);
  std::vector<float> logits;
  std::vector<DrawFields> draws(kRows);
  std::vector<AdjustFields> adjustments;
  std::vector<int32_t> expected;
  for (int r = 0; r < kRows; ++r) {
    std::vector<float> row = RandomLogits(kVocab, r);
    if (r == 7) row[3] = kInfinity;
    if (r == 8) row[kVocab - 1] = std::numeric_limits<float>::quiet_NaN();
    if (r == 9) row[17] = row[4321] = 50;
    SamplingParams params;
    params.temperature = r % 4 == 0 || r == 9 ? 0.0f : 0.3f * static_cast<float>(r % 9);
    params.seed = 1000 + r;
    ASSERT_TRUE(Sampler::IsPlain(params));
    expected.push_back(sampler.Sample(row.data(), params, TokenCounts(kVocab), {}, r, false).id);
    draws[r] = PlanDraw(params, TokenCounts(kVocab), {}, r, &adjustments);
    logits.insert(logits.end(), row.begin(), row.end());
  }
  EXPECT_EQ(expected[7], kNotFinite);
  EXPECT_EQ(expected[9], 17);
  const Buffer memory = *backend->Allocate(kRows * (kVocab + kDrawFields + 1) * 4);
  const Tensor values = memory.View(0, DType::kFloat32, kRows, kVocab);
  const Tensor wanted = memory.View(values.bytes(), DType::kInt32, kRows, kDrawFields);
  const Tensor tokens = memory.View(values.bytes() + wanted.bytes(), DType::kInt32, 1, kRows);
  backend->Upload(values, logits.data());
  backend->Upload(wanted, draws.data());
  backend->Draw(tokens, {}, values, wanted, {0, kKnown});
  std::vector<int32_t> drawn(kRows);
  backend->Download(drawn.data(), tokens);
  backend->Synchronize();
  EXPECT_EQ(drawn, expected);
}

TEST(Sampler, OnlyWhatTheLogitsDecideIsPlain) {
  const auto plain = [](auto change) {
    SamplingParams params;
    params.temperature = 1.0f;
    change(params);
    return Sampler::IsPlain(params);
  };
  EXPECT_TRUE(plain([](SamplingParams&) {}));
  EXPECT_TRUE(plain([](SamplingParams& p) { p.temperature = 0.0f, p.top_k = 5, p.top_p = 0.5f, p.min_p = 0.1f; }));
  EXPECT_FALSE(plain([](SamplingParams& p) { p.top_k = 5; }));
  EXPECT_FALSE(plain([](SamplingParams& p) { p.top_p = 0.5f; }));
  EXPECT_FALSE(plain([](SamplingParams& p) { p.min_p = 0.1f; }));
  EXPECT_FALSE(plain([](SamplingParams& p) { p.repetition_penalty = 1.1f; }));
  EXPECT_FALSE(plain([](SamplingParams& p) { p.presence_penalty = 0.1f; }));
  EXPECT_FALSE(plain([](SamplingParams& p) { p.frequency_penalty = 0.1f; }));
  EXPECT_FALSE(plain([](SamplingParams& p) { p.logit_bias = {{3, 1.0f}}; }));
  EXPECT_FALSE(plain([](SamplingParams& p) { p.allowed_token_ids = {3}; }));
}

TEST(Sampler, NeverChoosesPaddingBeyondTheTokenizersVocabulary) {
  Sampler sampler(4, 3);
  const std::vector<float> logits = {1, 2, 3, 9};
  EXPECT_EQ(sampler.Sample(logits.data(), {}, TokenCounts(4), {}, 0, false).id, 2);
  SamplingParams hot;
  hot.temperature = 100;
  for (int step = 0; step < 200; ++step)
    EXPECT_LT(sampler.Sample(logits.data(), hot, TokenCounts(4), {}, step, false).id, 3);
}

// Probabilities by the processors of Transformers 5.24 in the order of its generate(): SequenceBias, RepetitionPenalty,
// then presence and frequency as vLLM's apply_penalties subtracts them, SuppressTokens, Temperature, TopK, TopP, MinP.
TEST(Sampler, DrawsWhatTransformersWould) {
  constexpr int kVocab = 8, kDraws = 40000;
  const std::vector<float> logits = {2.0f, 1.5f, 1.5f, 0.25f, -0.5f, 3.0f, -1.0f, 0.75f};
  TokenCounts counts(kVocab);
  for (const int32_t id : {5, 0, 4}) counts.AddPrompt(id);
  for (const int32_t id : {1, 1, 4, 6}) counts.AddOutput(id);
  struct Case {
    SamplingParams params;
    std::vector<int32_t> banned;
    std::array<double, kVocab> probabilities;
  };
  const auto with = [](auto change) {
    SamplingParams params;
    params.temperature = 1.0f;
    params.seed = 3;
    change(params);
    return params;
  };
  const Case cases[] = {
      {with([](SamplingParams& p) { p.temperature = 0.7f, p.top_k = 4; }),
       {},
       {0.162554, 0.079577, 0.079577, 0.0, 0.0, 0.678293, 0.0, 0.0}},
      {with([](SamplingParams& p) { p.temperature = 1.3f, p.top_p = 0.8f; }),
       {},
       {0.221262, 0.150616, 0.150616, 0.0, 0.0, 0.477507, 0.0, 0.0}},
      {with([](SamplingParams& p) { p.temperature = 1.3f, p.top_k = 5, p.top_p = 0.9f; }),
       {},
       {0.221262, 0.150616, 0.150616, 0.0, 0.0, 0.477507, 0.0, 0.0}},
      {with([](SamplingParams& p) { p.temperature = 2.0f, p.min_p = 0.3f; }),
       {},
       {0.2109, 0.164249, 0.164249, 0.0, 0.0, 0.347715, 0.0, 0.112887}},
      {with([](SamplingParams& p) { p.temperature = 1.5f, p.top_p = 0.95f, p.min_p = 0.25f; }),
       {},
       {0.228269, 0.163562, 0.163562, 0.0, 0.0, 0.444607, 0.0, 0.0}},
      {with([](SamplingParams& p) { p.repetition_penalty = 1.8f; }),
       {},
       {0.159145, 0.120547, 0.234794, 0.067269, 0.0213, 0.277376, 0.00866, 0.110909}},
      {with([](SamplingParams& p) { p.presence_penalty = 0.5f, p.frequency_penalty = 0.4f; }),
       {},
       {0.19984, 0.033033, 0.121209, 0.034727, 0.006669, 0.543221, 0.004045, 0.057255}},
      {with([](SamplingParams& p) {
         p.logit_bias = {{3, 2.5f}, {4, 1.5f}, {5, -2.0f}};
         p.repetition_penalty = 1.5f, p.presence_penalty = 0.3f, p.frequency_penalty = 0.2f;
         p.temperature = 0.8f, p.top_k = 6, p.top_p = 0.9f, p.min_p = 0.05f;
       }),
       {},
       {0.116419, 0.0, 0.143384, 0.684047, 0.0, 0.0, 0.0, 0.05615}},
      {with([](SamplingParams& p) { p.temperature = 0.9f, p.top_k = 3; }),
       {5, 0},
       {0.0, 0.410745, 0.410745, 0.0, 0.0, 0.0, 0.0, 0.178509}},
  };
  Sampler sampler(kVocab, kVocab);
  for (const Case& expected : cases) {
    std::array<int, kVocab> drawn = {};
    for (int step = 0; step < kDraws; ++step) {
      ++drawn[sampler.Sample(logits.data(), expected.params, counts, expected.banned, step, false).id];
    }
    for (int id = 0; id < kVocab; ++id) {
      const double p = expected.probabilities[id];
      const double share = drawn[id] / static_cast<double>(kDraws);
      EXPECT_NEAR(share, p, 5 * std::sqrt(p * (1 - p) / kDraws)) << "case " << &expected - cases << ", id " << id;
    }
  }
}

TEST(Sampler, DrawsFollowTheSoftmaxAtTheTemperature) {
  const std::vector<float> logits = {0.0f, 1.0f, -1.0f, 2.0f};
  SamplingParams params;
  params.temperature = 1.7f;
  params.seed = 11;
  constexpr int kDraws = 200000;
  const std::vector<int> histogram = Histogram(logits, params, kDraws);
  double total = 0;
  for (float x : logits) total += std::exp(x / 1.7);
  for (int id = 0; id < 4; ++id) {
    const double p = std::exp(logits[id] / 1.7) / total;
    EXPECT_NEAR(histogram[id] / static_cast<double>(kDraws), p, 5 * std::sqrt(p * (1 - p) / kDraws)) << id;
  }
}

// The shortcut in Draw must not change what is drawn: a large vocabulary against its definition.
TEST(Sampler, DrawsFollowTheSoftmaxOverALargeVocabulary) {
  const std::vector<float> logits = RandomLogits(5000, 1);
  SamplingParams params;
  params.temperature = 1.0f;
  constexpr int kDraws = 20000;
  const std::vector<int> histogram = Histogram(logits, params, kDraws);
  double total = 0, drawn_mass = 0, expected_mass = 0;
  for (float x : logits) total += std::exp(x);
  for (int id = 0; id < 5000; ++id) {
    if (logits[id] < 6) continue;  // the head of the distribution, as one event
    expected_mass += std::exp(logits[id]) / total;
    drawn_mass += histogram[id] / static_cast<double>(kDraws);
  }
  EXPECT_NEAR(drawn_mass, expected_mass, 5 * std::sqrt(expected_mass * (1 - expected_mass) / kDraws));
}

TEST(Sampler, TheSameSeedAndStepGiveTheSameTokenAndOthersDiffer) {
  const std::vector<float> logits(1000, 0.0f);
  Sampler sampler(1000, 1000);
  const TokenCounts counts(1000);
  SamplingParams a, b;
  a.temperature = b.temperature = 1.0f;
  a.seed = 1;
  b.seed = 2;
  int same_step = 0, same_seed = 0;
  for (int step = 0; step < 100; ++step) {
    const int id = sampler.Sample(logits.data(), a, counts, {}, step, false).id;
    EXPECT_EQ(sampler.Sample(logits.data(), a, counts, {}, step, false).id, id);
    same_step += sampler.Sample(logits.data(), b, counts, {}, step, false).id == id;
    same_seed += sampler.Sample(logits.data(), a, counts, {}, step + 1, false).id == id;
  }
  EXPECT_LT(same_step, 5);
  EXPECT_LT(same_seed, 5);
}

TEST(Sampler, TopKTopPAndMinPCutTheTail) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f), std::log(0.05f)};
  SamplingParams top_k, top_p, min_p;
  top_k.temperature = top_p.temperature = min_p.temperature = 1.0f;
  top_k.top_k = 2;
  top_p.top_p = 0.7f;   // .5 + .3 reach it
  min_p.min_p = 0.25f;  // .15 >= .125, .05 is not
  using testing::ElementsAre;
  using testing::Gt;
  EXPECT_THAT(Histogram(logits, top_k, 1000), ElementsAre(Gt(0), Gt(0), 0, 0));
  EXPECT_THAT(Histogram(logits, top_p, 1000), ElementsAre(Gt(0), Gt(0), 0, 0));
  EXPECT_THAT(Histogram(logits, min_p, 1000), ElementsAre(Gt(0), Gt(0), Gt(0), 0));
}

TEST(Sampler, TopPKeepsTheSmallestSufficientSetOfALargeVocabulary) {
  const std::vector<float> logits = RandomLogits(5000, 2);
  std::vector<double> p(logits.begin(), logits.end());
  double total = 0;
  for (double& x : p) total += x = std::exp(x);
  std::sort(p.rbegin(), p.rend());
  double mass = 0;
  size_t kept = 0;
  while (mass < 0.9 * total) mass += p[kept++];
  SamplingParams params;
  params.temperature = 1.0f;
  params.top_p = 0.9f;
  const double least = std::log(p[kept - 1]) - 1e-5;
  const std::vector<int> histogram = Histogram(logits, params, 5000);
  for (size_t id = 0; id < logits.size(); ++id) {
    if (logits[id] < least) {
      EXPECT_EQ(histogram[id], 0) << id;
    }
  }
}

TEST(Sampler, PenaltiesActOnSeenTokensOnly) {
  Sampler sampler(3, 3);
  TokenCounts counts(3);
  counts.AddPrompt(2);
  counts.AddOutput(1);
  const std::vector<float> logits = {1.0f, 2.0f, 3.0f};
  SamplingParams presence, repetition;
  presence.presence_penalty = 5.0f;  // output only: token 1
  EXPECT_EQ(sampler.Sample(logits.data(), presence, counts, {}, 0, false).id, 2);
  repetition.repetition_penalty = 4.0f;  // prompt and output: 2 -> 3/4, 1 -> 2/4
  EXPECT_EQ(sampler.Sample(logits.data(), repetition, counts, {}, 0, false).id, 0);
  SamplingParams frequency;
  frequency.frequency_penalty = 0.6f;
  const std::vector<float> close = {1.0f, 2.0f, 0.0f};
  EXPECT_EQ(sampler.Sample(close.data(), frequency, counts, {}, 0, false).id, 1);
  counts.AddOutput(1);  // 2 - 2 * 0.6 < 1
  EXPECT_EQ(sampler.Sample(close.data(), frequency, counts, {}, 0, false).id, 0);
  counts.Clear();
  EXPECT_EQ(sampler.Sample(close.data(), frequency, counts, {}, 0, false).id, 1);
}

TEST(Sampler, RepetitionPenaltyMakesNegativeLogitsSmaller) {
  Sampler sampler(2, 2);
  TokenCounts counts(2);
  counts.AddPrompt(0);
  SamplingParams params;
  params.repetition_penalty = 3.0f;
  const std::vector<float> logits = {-1.0f, -2.0f};
  EXPECT_EQ(sampler.Sample(logits.data(), params, counts, {}, 0, false).id, 1);
}

TEST(Sampler, BiasAllowedAndBannedTokensDecideWhatMayBeChosen) {
  Sampler sampler(4, 4);
  const TokenCounts counts(4);
  const std::vector<float> logits = {1, 2, 3, 4};
  SamplingParams biased, allowed;
  biased.logit_bias = {{0, 10.0f}};
  allowed.allowed_token_ids = {1, 2};
  EXPECT_EQ(sampler.Sample(logits.data(), biased, counts, {}, 0, false).id, 0);
  EXPECT_EQ(sampler.Sample(logits.data(), allowed, counts, {}, 0, false).id, 2);
  const std::vector<int32_t> banned = {2, 3};
  EXPECT_EQ(sampler.Sample(logits.data(), allowed, counts, banned, 0, false).id, 1);
  const std::vector<int32_t> all = {1, 2};
  EXPECT_EQ(sampler.Sample(logits.data(), allowed, counts, all, 0, false).id, kNothingAllowed);
}

TEST(Sampler, LogitsThatAreNotFiniteAreReported) {
  Sampler sampler(3, 3);
  for (float bad : {kInfinity, -kInfinity, std::nanf("")}) {
    const std::vector<float> logits = {0, bad, 1};
    EXPECT_EQ(sampler.Sample(logits.data(), {}, TokenCounts(3), {}, 0, false).id, kNotFinite);
  }
}

TEST(Sampler, ATinyTemperatureIsGreedyNotNaN) {
  Sampler sampler(3, 3);
  SamplingParams params;
  params.temperature = std::numeric_limits<float>::denorm_min();
  const std::vector<float> logits = {-3e38f, 3e38f, 1};
  EXPECT_EQ(sampler.Sample(logits.data(), params, TokenCounts(3), {}, 0, false).id, 1);
}

TEST(Sampler, APenaltyNearZeroOverflowsNothing) {
  Sampler sampler(3, 3);
  TokenCounts counts(3);
  counts.AddPrompt(0);
  counts.AddPrompt(1);
  SamplingParams params;
  params.temperature = 1.0f;
  params.repetition_penalty = std::numeric_limits<float>::min();
  const std::vector<float> logits = {-3.0f, 4.0f, 1.0f};
  EXPECT_EQ(sampler.Sample(logits.data(), params, counts, {}, 0, false).id, 1);
}

TEST(Sampler, LogprobsAndRanksAreThoseOfTheUnmodifiedLogits) {
  Sampler sampler(4, 4);
  const std::vector<float> logits = {0.0f, 1.0f, 2.0f, 3.0f};
  SamplingParams params;
  params.logit_bias = {{1, 50.0f}};
  params.temperature = 0.3f;
  const Sampler::Choice choice = sampler.Sample(logits.data(), params, TokenCounts(4), {}, 0, true);
  EXPECT_EQ(choice.id, 1);
  EXPECT_EQ(choice.rank, 3);
  EXPECT_NEAR(choice.logprob, 1 - std::log(1 + std::exp(1.0) + std::exp(2.0) + std::exp(3.0)), 1e-6);
}

TEST(Sampler, TopListsTheMostLikelyInOrder) {
  const std::vector<float> logits = {3, 9, 9, 1, 7};
  Sampler sampler(5, 5);
  const auto top = sampler.Top(logits.data(), 3);
  ASSERT_EQ(top.size(), 3u);
  EXPECT_EQ(top[0].id, 1);
  EXPECT_EQ(top[1].id, 2);
  EXPECT_EQ(top[2].id, 4);
  EXPECT_EQ(top[0].logprob, top[1].logprob);
  EXPECT_NEAR(top[0].logprob - top[2].logprob, 2.0f, 1e-6);
  EXPECT_EQ(sampler.Top(logits.data(), 5).size(), 5u);
  EXPECT_TRUE(sampler.Top(logits.data(), 0).empty());
}

}  // namespace
}  // namespace dejavu
