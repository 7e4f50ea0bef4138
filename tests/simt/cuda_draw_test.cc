// Draw of the CUDA backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

#include "tests/kernels/matrix.h"
#include "tests/simt/cuda_fixture.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

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
    draws.insert(draws.end(), {std::bit_cast<int32_t>(temperature), 77 * r, -5 * r});
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
    draws.insert(draws.end(), {std::bit_cast<int32_t>(r % 2 == 0 ? 0.0f : 0.7f), 31 * r, 5 * r});
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

}  // namespace
}  // namespace dejavu
