// Draw of the CUDA backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/matrix.h"
#include "tests/simt/cuda_fixture.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

// int32 [rows, kDrawFields], plain draws of those temperatures.
std::vector<int32_t> PlainDraw(float temperature, int32_t key_low, int32_t key_high) {
  std::vector<int32_t> draw(kDrawFields);
  draw[kDrawTemperature] = std::bit_cast<int32_t>(temperature);
  draw[kDrawKeyLow] = key_low;
  draw[kDrawKeyHigh] = key_high;
  return draw;
}
void Append(const std::vector<int32_t>& fields, std::vector<int32_t>* to) {
  to->insert(to->end(), fields.begin(), fields.end());
}

TEST_P(CudaBackendTest, DrawsTheTokensOfTheCpu) {
  constexpr int kRows = 16, kVocab = 1003, kKnown = 1000, kFirst = 5000;
  Matrix logits = Random(kRows, kVocab, 1);
  for (float& logit : logits.values) logit *= 5.0f;
  logits.at(3, 17) = logits.at(3, 900) = 40.0f;
  logits.at(4, kVocab - 1) = kNaN;
  logits.at(5, 2) = kInfinity;
  logits.at(6, kVocab - 2) = 50.0f;  // padding
  std::vector<int32_t> draws;
  for (int r = 0; r < kRows; ++r) {
    const float temperature = r % 3 == 0 ? 0.0f : 0.4f * static_cast<float>(r);
    Append(PlainDraw(temperature, 77 * r, -5 * r), &draws);
  }
  Tensor wanted = arena_.PutInts(draws), tokens = arena_.PutInts(std::vector<int32_t>(kRows, -7));
  wanted.rows = kRows;
  wanted.cols = wanted.stride = kDrawFields;
  const Tensor on_device = Device(tokens);
  const Matrix no_bests = Random(kRows, kBestFields, 2);
  const Tensor bests = arena_.Put(no_bests), bests_on_device = Put(no_bests);
  constexpr Candidates kSome = {kFirst, kFirst + kKnown};
  cpu_->Draw(tokens, bests, arena_.Put(logits), wanted, kSome);
  cuda_->Draw(on_device, bests_on_device, Put(logits), Device(wanted), kSome);
  const std::vector<int32_t> expected(tokens.row<int32_t>(0), tokens.row<int32_t>(0) + kRows);
  EXPECT_EQ(expected[3], kFirst + 17);
  EXPECT_EQ(expected[4], -1);
  EXPECT_EQ(expected[5], -1);
  EXPECT_LT(expected[6], kFirst + kKnown);
  EXPECT_EQ(Ints(on_device), expected);
  const Matrix values = Got(bests_on_device);
  for (int r = 0; r < kRows; ++r) {
    if (expected[r] < 0) continue;
    EXPECT_EQ(values.at(r, kBestLogit), bests.row<float>(r)[kBestLogit]) << r;
    EXPECT_NEAR(values.at(r, kBestScore), bests.row<float>(r)[kBestScore], 1e-5) << r;
  }
}

TEST_P(CudaBackendTest, DrawsFromSlicesWhatItDrawsFromAll) {
  constexpr int kRows = 12, kVocab = 501, kEnd = 490, kCut = 200;
  Matrix logits = Random(kRows, kVocab, 1);
  std::vector<int32_t> draws;
  for (int r = 0; r < kRows; ++r) {
    Append(PlainDraw(r % 2 == 0 ? 0.0f : 0.7f, 31 * r, 5 * r), &draws);
  }
  Tensor wanted = arena_.PutInts(draws);
  wanted.rows = kRows;
  wanted.cols = wanted.stride = kDrawFields;
  const Tensor x = Put(logits), on_device = Device(wanted);
  const auto draw = [&](Tensor part, int64_t first) {
    const Tensor tokens = Device(arena_.PutInts(std::vector<int32_t>(kRows, -7)));
    const Tensor bests = Put(Random(kRows, kBestFields, 2));
    cuda_->Draw(tokens, bests, part, on_device, {first, kEnd});
    return std::make_pair(Ints(tokens), Got(bests));
  };
  const auto all = draw(x, 0), left = draw(x.Cols(0, kCut), 0), right = draw(x.Cols(kCut, kVocab - kCut), kCut);
  for (int r = 0; r < kRows; ++r) {
    const double inverse = r % 2 == 0 ? 1.0 : 1.0 / 0.7f;
    const auto worth = [&](const Matrix& b) { return b.at(r, kBestLogit) * inverse + b.at(r, kBestScore); };
    EXPECT_EQ(all.first[r], worth(right.second) > worth(left.second) ? right.first[r] : left.first[r]) << r;
  }
}

// Rows of every kind side by side: tokens, log-probabilities and lists of the CPU, which are the Sampler's, bit by bit.
class DrawsWithMore : public CudaBackendTest {
 protected:
  static constexpr int kRows = 24, kVocab = 2003, kKnown = 2000;

  void AddRow(const std::vector<int32_t>& fields) { Append(fields, &draws_); }
  void Adjust(int32_t id, float bias, float minus, int32_t flags) {
    Append({id, std::bit_cast<int32_t>(bias), std::bit_cast<int32_t>(minus), flags}, &adjustments_);
  }
  int32_t adjustments() const { return static_cast<int32_t>(adjustments_.size()) / kAdjustFields; }
  Tensor Shaped(const std::vector<int32_t>& values, int64_t cols) {
    Tensor t = arena_.PutInts(values);
    t.rows = t.cols / cols;
    t.cols = t.stride = cols;
    return t;
  }

  // What only one row in three wants is drawn from `random`.
  std::vector<int32_t> RandomRow(std::mt19937& random) {
    const auto pick = [&](auto... values) {
      const std::vector<float> all = {static_cast<float>(values)...};
      return all[random() % all.size()];
    };
    const auto bits = [](float value) { return std::bit_cast<int32_t>(value); };
    std::vector<int32_t> draw = PlainDraw(pick(0, 0.3, 1, 1, 4), static_cast<int32_t>(random()), 7);
    draw[kDrawWants] = kDrawMore;
    draw[kDrawTopK] = static_cast<int32_t>(pick(0, 0, 1, 5, 128, 129, 700, 5000));
    draw[kDrawTopP] = bits(pick(1, 1, 0.1, 0.9, 0.999, 0.9999999));
    draw[kDrawLeast] = bits(std::log(pick(0, 0, 0.05, 1)));
    draw[kDrawPenalty] = bits(pick(1, 1.3, 0.7));
    if (random() % 2 == 0) {
      draw[kDrawWants] |= kDrawLogprobs;
      draw[kDrawTop] = static_cast<int32_t>(pick(0, 1, 5, kMostTop));
    }
    if (random() % 2 == 0) {
      if (random() % 3 == 0) draw[kDrawWants] |= kDrawOnlyAdjusted;
      draw[kDrawAdjusted] = adjustments();
      std::set<int32_t> ids;
      for (int i = 0; i < 40; ++i) ids.insert(static_cast<int32_t>(random() % kVocab));
      for (const int32_t id : ids) {
        Adjust(id, pick(0, 3, -2), pick(0, 0.5), static_cast<int32_t>(random() % 4));
      }
      draw[kDrawAdjustments] = adjustments() - draw[kDrawAdjusted];
    }
    return draw;
  }

  struct Drawn {
    std::vector<int32_t> tokens, details;
    Matrix logits;
  };
  Drawn On(Backend& backend, const Matrix& logits) {
    const bool device = &backend == cuda_.get();
    const auto put = [&](Tensor t) { return device ? Device(t) : t; };
    const Tensor tokens = put(arena_.PutInts(std::vector<int32_t>(kRows, -7)));
    const Tensor x = put(arena_.Put(logits)), wanted = put(Shaped(draws_, kDrawFields));
    const Tensor results = put(Shaped(std::vector<int32_t>(kRows * kDetailFields, -7), kDetailFields));
    const DrawDetails details = {put(Shaped(adjustments_, kAdjustFields)),
                                 put(arena_.Put(Matrix(1, adjustments(), 0.0f))), results};
    backend.Draw(tokens, {}, x, wanted, {0, kKnown}, details);
    const auto ints = [&](const Tensor& t) {
      const Tensor host = device ? Host(t) : t;
      return std::vector<int32_t>(host.row<int32_t>(0), host.row<int32_t>(0) + host.rows * host.cols);
    };
    return {ints(tokens), ints(results), device ? Got(x) : Get(x)};
  }
  void ExpectSame(const Matrix& logits) {
    const Drawn cpu = On(*cpu_, logits), cuda = On(*cuda_, logits);
    EXPECT_EQ(cuda.tokens, cpu.tokens);
    for (int r = 0; r < kRows; ++r) {
      if (cpu.tokens[r] < 0) continue;  // nothing is to be said of no token
      const auto of_row = [&](const Drawn& drawn) {
        const auto begin = drawn.details.begin() + r * kDetailFields;
        return std::vector<int32_t>(begin, begin + kDetailFields);
      };
      EXPECT_EQ(of_row(cuda), of_row(cpu)) << "row " << r;
    }
    EXPECT_TRUE(SameBits(cuda.logits, logits)) << "adjustments are taken back";
    tokens_ = cuda.tokens;
  }

  std::vector<int32_t> draws_, adjustments_, tokens_;
};

TEST_P(DrawsWithMore, OfRandomRowsAreTheCpus) {
  std::mt19937 random(static_cast<uint32_t>(GetParam()) + 1);
  Matrix logits = Random(kRows, kVocab, 3);
  for (int r = 0; r < kRows; ++r) {
    // From nearly flat to steep; some rows have many equals.
    for (int i = 0; i < kVocab; ++i) {
      float& logit = logits.at(r, i);
      logit *= 0.5f + static_cast<float>(r % 6);
      if (r % 5 == 4) logit = std::round(logit);
    }
    AddRow(r % 6 == 5 ? PlainDraw(0.8f, r, r) : RandomRow(random));
  }
  ExpectSame(logits);
}

// All logits equal, the best in one thread's places, a temperature at which all scores but the best are the least.
TEST_P(DrawsWithMore, OfRowsThatTheBestDoNotDecideAreTheCpus) {
  Matrix logits = Random(kRows, kVocab, 5);
  std::mt19937 random(11);
  for (int r = 0; r < kRows; ++r) {
    std::vector<int32_t> draw = RandomRow(random);
    draw[kDrawTemperature] = std::bit_cast<int32_t>(r % 4 == 3 ? 1e-38f : 1.0f);
    draw[kDrawTopK] = r % 2 == 0 ? 0 : 900;
    draw[kDrawTopP] = std::bit_cast<int32_t>(0.97f);
    draw[kDrawLeast] = std::bit_cast<int32_t>(-kInfinity);
    draw[kDrawWants] |= kDrawLogprobs;
    draw[kDrawTop] = kMostTop;
    for (int i = 0; i < kVocab; ++i) {
      if (r % 4 == 0) logits.at(r, i) = 1.5f;
      if (r % 4 == 1 && i % cuda::kBlockThreads < 4) logits.at(r, i) += 10.0f;
    }
    AddRow(draw);
  }
  ExpectSame(logits);
}

TEST_P(DrawsWithMore, SayWhereNothingIsAllowedOrFinite) {
  Matrix logits = Random(kRows, kVocab, 7);
  logits.at(2, 9) = kNaN;
  for (int r = 0; r < kRows; ++r) {
    std::vector<int32_t> draw = PlainDraw(r % 2 == 0 ? 0.0f : 1.0f, r, r);
    draw[kDrawWants] = kDrawMore | kDrawOnlyAdjusted;
    draw[kDrawTopP] = draw[kDrawPenalty] = std::bit_cast<int32_t>(1.0f);
    draw[kDrawLeast] = std::bit_cast<int32_t>(-kInfinity);
    draw[kDrawAdjusted] = adjustments();
    Adjust(17, 0.0f, 0.0f, r < 4 ? kAdjustBanned : 0);
    if (r < 8) Adjust(kVocab - 1, 50.0f, 0.0f, 0);  // padding
    draw[kDrawAdjustments] = adjustments() - draw[kDrawAdjusted];
    AddRow(draw);
  }
  ExpectSame(logits);
  std::vector<int32_t> expected(kRows, 17);
  std::fill_n(expected.begin(), 4, kNothingAllowed);
  expected[2] = kNotFinite;
  EXPECT_EQ(tokens_, expected);
}

INSTANTIATE_TEST_SUITE_P(Orders, DrawsWithMore, testing::Values(0, 1, 2),
                         [](const auto& info) { return "Order" + std::to_string(info.param); });

}  // namespace
}  // namespace dejavu
