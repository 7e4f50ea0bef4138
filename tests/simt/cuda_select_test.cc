// Select of the CUDA backend, which fills the same bits as the CPU's.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/matrix.h"
#include "tests/simt/cuda_fixture.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

class CudaSelectTest : public CudaBackendTest {
 protected:
  static int64_t Padded(int64_t outputs) {
    return (outputs + kSelectorPadding - 1) / kSelectorPadding * kSelectorPadding;
  }
  void Use(int64_t outputs, const std::vector<int32_t>& ranks) {
    Matrix b = Random(*std::max_element(ranks.begin(), ranks.end()), Padded(outputs), 31);
    for (float& value : b.values) value = std::round(127.0f * value);
    Matrix thresholds = Random(static_cast<int64_t>(ranks.size()), Padded(outputs), 32);
    for (float& value : thresholds.values) value *= 300.0f;
    for (int64_t point = 0; point < thresholds.rows; ++point) {
      for (int64_t j = outputs; j < thresholds.cols; ++j) thresholds.at(point, j) = kInfinity;
      thresholds.at(point, 0) = -kInfinity;
    }
    w_ = {arena_.Put(b, DType::kInt8), arena_.Put(thresholds, DType::kFloat16), arena_.PutInts(ranks), outputs};
  }

  // Everything that Select fills, in one list.
  std::vector<int32_t> SelectOn(Backend& backend, const Matrix& a, const std::vector<int32_t>& points) {
    constexpr int32_t kNone = std::numeric_limits<int32_t>::min();
    const int64_t words = w_.b.cols / 32;
    Selection selection = {arena_.PutInts(std::vector<int32_t>(w_.outputs, kNone)), arena_.PutInts({kNone})};
    selection.masks = arena_.Make(DType::kInt32, a.rows + 1, words);  // a step of fewer rows than there is room for
    std::fill_n(selection.masks.row<int32_t>(0), (a.rows + 1) * words, kNone);
    Tensor counts = arena_.PutInts(std::vector<int32_t>(a.rows, kNone)), at = arena_.PutInts(points);
    const bool cpu = &backend == cpu_.get();
    if (cpu) {
      backend.Select(selection, counts, arena_.Put(a), w_, at);
    } else {
      const SelectorWeights w = {Device(w_.b), Device(w_.thresholds), Device(w_.ranks), w_.outputs};
      selection = Device(selection);
      counts = Device(counts);
      backend.Select(selection, counts, Put(a), w, Device(at));
    }
    std::vector<int32_t> all;
    for (const Tensor& t : {selection.count, counts, selection.indices, selection.masks}) {
      const Tensor host = cpu ? t : Host(t);
      all.insert(all.end(), host.row<int32_t>(0), host.row<int32_t>(0) + host.rows * host.cols);
    }
    return all;
  }

  SelectorWeights w_;
};
INSTANTIATE_TEST_SUITE_P(Orders, CudaSelectTest, testing::Values(0, 1, 2),
                         [](const auto& info) { return absl::StrCat("Order", info.param); });

TEST_P(CudaSelectTest, SelectsWhatTheCpuSelectsBitByBit) {
  for (const int64_t outputs : {4, 63, 64, 65, 1000}) {
    Use(outputs, {40, 17, 3, 0});
    for (const int64_t rows : {1, 2, 7, 8, 9, 16, 17}) {
      SCOPED_TRACE(testing::Message() << outputs << " outputs, rows " << rows);
      const Matrix a = Random(rows, 40, 1);
      std::vector<int32_t> points(rows);
      for (int64_t r = 0; r < rows; ++r) points[r] = rows > 1 && r % 5 == 4 ? kSelectEverything : r % 4;
      EXPECT_EQ(SelectOn(*cuda_, a, points), SelectOn(*cpu_, a, points));
    }
    EXPECT_EQ(SelectOn(*cuda_, Random(1, 40, 2), {kSelectEverything}),
              SelectOn(*cpu_, Random(1, 40, 2), {kSelectEverything}));
  }
}

TEST_P(CudaSelectTest, SelectsWhatTheCpuSelectsAtTheEdges) {
  Use(130, {1100, 8});  // more coordinates than are added in integers at once
  Matrix a = Random(5, 1100, 1);
  a.at(1, 1050) = kNaN;  // beyond rank 8 only
  a.at(2, 3) = kInfinity;
  for (float& value : a.values) value *= 1e-3f;
  for (int64_t k = 0; k < 1100; ++k) a.at(3, k) = 1e-33f;  // next to nothing
  for (const std::vector<int32_t>& points : {std::vector<int32_t>{0, 0, 0, 0, 0}, {1, 1, 1, 1, 1}, {0, 1, 0, 1, 0}}) {
    EXPECT_EQ(SelectOn(*cuda_, a, points), SelectOn(*cpu_, a, points));
  }
}

TEST_P(CudaSelectTest, TheNormThatIsHeldBackSharesItsLaunch) {
  Use(300, {16});
  const Matrix x = Random(3, 70, 1), a = Random(3, 16, 2);
  const NormWeights norm = {Put(Random(1, 70, 3)), Put(Random(1, 70, 4)), 1e-5f};
  const Tensor sum = Put(x), h = Put(Matrix(3, 70)), apart_sum = Put(x), apart = Put(Matrix(3, 70)), y = Put(x);
  cuda_->Add(apart_sum, y);
  cuda_->LayerNorm(apart, apart_sum, norm);
  cuda_->Synchronize();
  const std::vector<int32_t> want = SelectOn(*cpu_, a, {0, 0, 0});
  simt::GetEmulation().ResetCounts();
  // Uploads of what SelectOn wants would end the holding back.
  const Selection selection = {Device(arena_.PutInts(std::vector<int32_t>(300))), Device(arena_.PutInts({0})),
                               Device(arena_.Make(DType::kInt32, 3, 10))};
  const Tensor counts = Device(arena_.PutInts({0, 0, 0})), points = Device(arena_.PutInts({0, 0, 0})), on_a = Put(a);
  const SelectorWeights w = {Device(w_.b), Device(w_.thresholds), Device(w_.ranks), w_.outputs};
  cuda_->Add(sum, y);
  cuda_->LayerNorm(h, sum, norm);
  cuda_->Select(selection, counts, on_a, w, points);
  cuda_->Synchronize();
  EXPECT_EQ(simt::GetEmulation().all_launches, 1);
  EXPECT_TRUE(SameBits(Got(h), Got(apart)));
  EXPECT_TRUE(SameBits(Got(sum), Got(apart_sum)));
  EXPECT_EQ(Ints(selection.count)[0], want[0]);
  EXPECT_EQ(Ints(counts), std::vector<int32_t>(want.begin() + 1, want.begin() + 4));
}

}  // namespace
}  // namespace dejavu
