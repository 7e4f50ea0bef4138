// Contextual sparsity in the CPU backend: what Select chooses, and what Linear and Attention compute of a selection. A
// row gets the same bits whoever shares its step, and what it leaves out without loss changes none of them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "tests/kernels/cpu/cpu_fixture.h"
#include "tests/kernels/matrix.h"

namespace dejavu {
namespace {

using Lists = std::vector<std::vector<int32_t>>;  // what each row selects
using testing::ElementsAre;
using testing::ElementsAreArray;
using testing::IsEmpty;
using testing::SizeIs;

constexpr int32_t kNone = std::numeric_limits<int32_t>::min();  // what no op writes

Matrix RowOf(const Matrix& m, int64_t r) { return RowsOf(m, r, 1); }

class CpuSelectedLinearTest : public CpuFixture {};
INSTANTIATE_TEST_SUITE_P(Targets, CpuSelectedLinearTest, EveryTargetAndThreads(), TargetAndThreads);

TEST_P(CpuSelectedLinearTest, ComputesTheSelectedOutputsAndTouchesNoOthers) {
  constexpr int32_t kGroups = 45;
  for (const DType dtype : kWeightTypes) {
    for (const int64_t group : {1, 7}) {
      const LinearWeights w =
          Weights(Random(kGroups * group, 67, 2), Layout::kOutputRows, dtype, Random(1, kGroups * group, 3));
      for (const auto& selected :
           {std::vector<int32_t>{}, {44}, EveryOther(1, kGroups, 3), EveryOther(0, kGroups, 1)}) {
        for (const int64_t rows : {1, 5, 17}) {
          SCOPED_TRACE(testing::Message()
                       << Name(dtype) << ", " << selected.size() << " groups of " << group << ", rows " << rows);
          const Matrix x = Random(rows, 67, 1);
          const Matrix got = Linear(x, w, arena_.Select(selected), group);
          EXPECT_TRUE(SameBits(got, OnlyGroups(Linear(x, w), selected, group, 77.0f)));
        }
      }
    }
  }
}

TEST_P(CpuSelectedLinearTest, WhatRidesAlongIsTheSameAsAProductOfItsOwn) {
  constexpr int64_t kGroup = 5;
  for (const auto& [groups, riding] : {std::pair<int32_t, int64_t>{13, 201}, {41, 3}}) {
    const LinearWeights w = Weights(Random(groups * kGroup, 67, 2), Layout::kOutputRows, DType::kInt8);
    const LinearWeights small =
        Weights(Random(riding, 67, 3), Layout::kOutputRows, DType::kFloat16, Random(1, riding, 4));
    for (const auto& selected : {std::vector<int32_t>{}, {groups - 1}, EveryOther(0, groups, 3)}) {
      for (const int64_t rows : {1, 5, 17}) {
        SCOPED_TRACE(testing::Message() << selected.size() << " of " << groups << " groups, " << riding
                                        << " outputs along, rows " << rows);
        const Matrix x = Random(rows, 67, 1);
        const Matrix alone = Linear(x, small);
        for (const Selection& selection : {arena_.Select(selected), Selection{}}) {
          const Tensor y = arena_.Put(Matrix(rows, w.outputs(), 77.0f));
          const Tensor along = arena_.Put(Matrix(rows, riding, 77.0f));
          backend_->Linear(y, arena_.Put(x), w, selection, kGroup, {along, &small});
          EXPECT_TRUE(SameBits(Get(y), Linear(x, w, selection, kGroup)));
          EXPECT_TRUE(SameBits(Get(along), alone));
        }
      }
    }
  }
}

int64_t Padded(int64_t outputs) { return (outputs + kSelectorPadding - 1) / kSelectorPadding * kSelectorPadding; }

// In quarters, so that sums of products with whole numbers are exact and fall on their thresholds now and then.
Matrix Quarters(int64_t rows, int64_t cols, uint32_t seed) {
  Matrix m = Random(rows, cols, seed);
  for (float& value : m.values) value = std::round(4.0f * value) / 4.0f;
  return m;
}

class CpuSelectTest : public CpuFixture {
 protected:
  // An operating point for each rank; thresholds lie within the sums' spread.
  void Use(int64_t outputs, const std::vector<int32_t>& ranks) {
    Matrix b = Random(*std::max_element(ranks.begin(), ranks.end()), Padded(outputs), 31);
    for (float& value : b.values) value = std::round(127.0f * value);
    Matrix thresholds = Random(static_cast<int64_t>(ranks.size()), Padded(outputs), 32);
    for (float& value : thresholds.values) value *= 300.0f;
    Use(outputs, ranks, b, thresholds);
  }

  void Use(int64_t outputs, const std::vector<int32_t>& ranks, const Matrix& b, Matrix thresholds) {
    for (int64_t point = 0; point < thresholds.rows; ++point) {
      for (int64_t j = outputs; j < thresholds.cols; ++j) thresholds.at(point, j) = kInfinity;
    }
    w_ = {arena_.Put(b, DType::kInt8), arena_.Put(thresholds, DType::kFloat16), arena_.PutInts(ranks), outputs};
  }

  // What each row selects, after a look at everything else that Select fills.
  Lists Select(const Matrix& a, const std::vector<int32_t>& points) { return SelectOn(*backend_, a, points); }

  Lists SelectOn(Backend& backend, const Matrix& a, const std::vector<int32_t>& points) {
    const int64_t words = w_.b.cols / 32;
    Selection selection = {arena_.PutInts(std::vector<int32_t>(w_.outputs, kNone)), arena_.PutInts({kNone})};
    selection.masks = arena_.Make(DType::kInt32, a.rows + 1, words);  // a step of fewer rows than there is room for
    std::fill_n(selection.masks.row<int32_t>(0), (a.rows + 1) * words, -1);
    const Tensor counts = arena_.PutInts(std::vector<int32_t>(a.rows, kNone));
    backend.Select(selection, counts, arena_.Put(a), w_, arena_.PutInts(points));

    Lists lists(a.rows);
    for (int64_t r = 0; r < a.rows; ++r) {
      for (int64_t j = 0; j < words * 32; ++j) {
        const bool bit = selection.masks.row<uint32_t>(r)[j / 32] >> (j % 32) & 1;
        if (bit) lists[r].push_back(static_cast<int32_t>(j));
      }
      EXPECT_THAT(lists[r], SizeIs(counts.row<int32_t>(0)[r])) << "row " << r;
      EXPECT_TRUE(lists[r].empty() || lists[r].back() < w_.outputs) << "row " << r << " selects padding";
    }
    const int32_t* indices = selection.indices.row<int32_t>(0);
    EXPECT_THAT(
        std::vector<int32_t>(indices, indices + std::clamp<int64_t>(*selection.count.row<int32_t>(0), 0, w_.outputs)),
        ElementsAreArray(UnionOf(lists)));
    for (int64_t word = 0; word < words; ++word) EXPECT_EQ(selection.masks.row<int32_t>(a.rows)[word], -1);
    return lists;
  }

  double Sum(const Matrix& a, int64_t r, int32_t point, int64_t j) const {
    double sum = 0.0;
    for (int64_t k = 0; k < w_.ranks.row<int32_t>(0)[point]; ++k) {
      sum += static_cast<double>(a.at(r, k)) * w_.b.row<int8_t>(k)[j];
    }
    return sum;
  }

  Lists Reference(const Matrix& a, const std::vector<int32_t>& points) const {
    const Matrix thresholds = Get(w_.thresholds);
    Lists lists(a.rows);
    for (int64_t r = 0; r < a.rows; ++r) {
      for (int64_t j = 0; j < w_.outputs; ++j) {
        if (points[r] == kSelectEverything || Sum(a, r, points[r], j) > thresholds.at(points[r], j)) {
          lists[r].push_back(static_cast<int32_t>(j));
        }
      }
    }
    return lists;
  }

  SelectorWeights w_;
};
INSTANTIATE_TEST_SUITE_P(Targets, CpuSelectTest, EveryTargetAndThreads(), TargetAndThreads);

constexpr int64_t kOutputCounts[] = {4, 63, 64, 65, 1000};

TEST_P(CpuSelectTest, SelectsWhatExceedsTheThresholdOfTheRowsOperatingPoint) {
  const std::vector<int32_t> points = {0, 2, kSelectEverything, 1, 0, 3, 2, 0, 3};
  const std::vector<int32_t> ranks = {33, 1, 7, 0};
  for (const int64_t outputs : kOutputCounts) {
    for (const int64_t rows : {1, 3, 9}) {
      SCOPED_TRACE(testing::Message() << outputs << " outputs, rows " << rows);
      Use(outputs, ranks);
      const Matrix a = Quarters(rows, 33, 1);
      Matrix thresholds = Get(w_.thresholds);
      for (int32_t point = 0; point < 4; ++point) {  // a sum on its threshold does not exceed it
        for (int64_t j = 0; j < outputs; j += 3) thresholds.at(point, j) = static_cast<float>(Sum(a, 0, point, j));
      }
      Use(outputs, ranks, Get(w_.b), thresholds);
      const std::vector<int32_t> own(points.begin(), points.begin() + rows);
      EXPECT_EQ(Select(a, own), Reference(a, own));
    }
  }
}

TEST_P(CpuSelectTest, InfiniteThresholdsAreAlwaysOrNeverExceeded) {
  for (const int64_t outputs : kOutputCounts) {
    const Matrix b(5, Padded(outputs), 127.0f);
    Matrix thresholds(2, Padded(outputs), kInfinity);
    for (int64_t j = 0; j < outputs; ++j) thresholds.at(0, j) = -kInfinity;
    Use(outputs, {5, 5}, b, thresholds);
    const Lists lists = Select(Matrix(3, 5, -1e30f), {0, 1, 0});
    EXPECT_EQ(lists[0], EveryOther(0, static_cast<int32_t>(outputs), 1));
    EXPECT_THAT(lists[1], IsEmpty());
    EXPECT_EQ(lists[2], lists[0]);
    EXPECT_THAT(Select(Matrix(1, 5, 1e30f), {1}), ElementsAre(IsEmpty()));
  }
}

TEST_P(CpuSelectTest, SelectsNothingWhereACoordinateWithinTheRankIsNotANumber) {
  for (const int64_t outputs : kOutputCounts) {
    Matrix thresholds(2, Padded(outputs), -kInfinity);
    Use(outputs, {8, 3}, Matrix(8, Padded(outputs), 0.0f), thresholds);
    Matrix a(4, 8);
    for (const int64_t r : {0, 1, 2}) a.at(r, 5) = kNaN;
    const std::vector<int32_t> everything = EveryOther(0, static_cast<int32_t>(outputs), 1);
    EXPECT_THAT(Select(a, {0, 1, kSelectEverything, 0}), ElementsAre(IsEmpty(), everything, everything, everything));
    EXPECT_THAT(Select(RowOf(a, 0), {0}), ElementsAre(IsEmpty()));
  }
}

TEST_P(CpuSelectTest, WhatARowSelectsDependsOnThatRowAlone) {
  std::unique_ptr<Backend> one_thread = CreateCpu(1);
  const std::vector<int32_t> points = {0, 1, 1, 2, kSelectEverything, 2, 0, 1, 0, 2, 1};
  const auto rows = static_cast<int64_t>(points.size());
  for (const int64_t outputs : kOutputCounts) {
    SCOPED_TRACE(testing::Message() << outputs << " outputs");
    Use(outputs, {40, 17, 3});
    const Matrix a = Random(rows, 40, 1);
    // Thresholds at the sums themselves: the last bit of a sum decides.
    Matrix thresholds = Get(w_.thresholds);
    for (int64_t j = 0; j < outputs; j += 2) thresholds.at(0, j) = static_cast<float>(Sum(a, 6, 0, j));
    Use(outputs, {40, 17, 3}, Get(w_.b), thresholds);

    const Lists together = Select(a, points);
    EXPECT_EQ(SelectOn(*one_thread, a, points), together) << "threads change what is selected";
    Matrix reversed = a;
    for (int64_t r = 0; r < rows; ++r) std::copy_n(&a.values[r * a.cols], a.cols, &reversed.at(rows - 1 - r, 0));
    Lists backwards = Select(reversed, {points.rbegin(), points.rend()});
    std::reverse(backwards.begin(), backwards.end());
    EXPECT_EQ(backwards, together);
    for (int64_t r = 0; r < rows; ++r) EXPECT_EQ(Select(RowOf(a, r), {points[r]})[0], together[r]) << "row " << r;
  }
}

class CpuSelectedAttentionTest : public CpuAttentionFixture {};
INSTANTIATE_TEST_SUITE_P(Targets, CpuSelectedAttentionTest, EveryTargetAndThreads(), TargetAndThreads);

TEST_P(CpuSelectedAttentionTest, ARowAttendsWithItsOwnHeadsAndTheOthersAreZeroOrUntouched) {
  constexpr int32_t kHeads = 40;
  constexpr int32_t kHeadDim = 5;
  Fill({70, 9, 1}, kHeads, kHeadDim, 16);
  // A prefill chunk, which makes groups of 16, 16 and 3 rows, and two sequences that decode.
  std::vector<int32_t> positions = EveryOther(30, 65, 1);
  std::vector<int32_t> sequences(positions.size(), 0);
  positions.insert(positions.end(), {8, 0});
  sequences.insert(sequences.end(), {1, 2});
  const auto rows = static_cast<int64_t>(positions.size());
  const Matrix dense = Attention(positions, sequences);

  Lists lists;
  for (uint32_t r = 0; r < rows; ++r) lists.push_back(Sample(kHeads, r % 5 == 0 ? 0.0 : 0.15, r));
  for (auto& list : lists) std::erase(list, 3);  // which nobody selects
  for (int64_t r = 0; r < rows; ++r) {
    if (r != 33) std::erase(lists[r], 35);  // which one row selects, so that whole groups do not
  }
  lists[33] = {35};
  const std::vector<int32_t> in_any = UnionOf(lists);
  ASSERT_THAT(in_any, SizeIs(kHeads - 1));
  std::vector<int32_t> mixed(rows);
  for (int64_t r = 0; r < rows; ++r) mixed[r] = r % 3 != 1;
  for (const auto& strict :
       {std::vector<int32_t>{}, std::vector<int32_t>(rows, 1), std::vector<int32_t>(rows, 0), mixed}) {
    const Matrix context = Attention(positions, sequences, arena_.SelectRows(lists, kHeads, strict));
    const Matrix whole_list = OnlyGroups(dense, in_any, kHeadDim, 77.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const bool is_strict = strict.empty() || strict[r] != 0;
      const Matrix own = OnlyGroups(OnlyGroups(dense, lists[r], kHeadDim, 0.0f), in_any, kHeadDim, 77.0f);
      EXPECT_TRUE(SameBits(RowOf(context, r), RowOf(is_strict ? own : whole_list, r)))
          << "row " << r << ", strict " << testing::PrintToString(strict);
    }
  }
}

TEST_P(CpuSelectedAttentionTest, SelectingAllIsDenseAndSelectingNoneTouchesNothing) {
  Fill({40}, 6, 12, 16);
  const Selection all = arena_.SelectRows(Lists(40, EveryOther(0, 6, 1)), 6);
  EXPECT_TRUE(SameBits(Whole(0, all), Whole(0)));
  EXPECT_TRUE(SameBits(Whole(0, arena_.SelectRows(Lists(40), 6)), Matrix(40, 72, 77.0f)));
}

TEST_P(CpuSelectedAttentionTest, ARowOfNotANumberLeavesTheHeadsZeroThatItDidNotSelect) {
  Fill({20}, 2, 8, 16);
  for (int64_t c = 0; c < 8; ++c) qkv_[0].at(17, c) = kNaN;  // its query
  const Matrix context = Attention({16, 17, 18}, {0, 0, 0}, arena_.SelectRows({{0, 1}, {1}, {0}}, 2));
  for (int64_t c = 0; c < 8; ++c) EXPECT_EQ(context.at(1, c), 0.0f);
  EXPECT_FALSE(std::isnan(context.at(2, 0)));
}

}  // namespace
}  // namespace dejavu
