// Mlp and Audit of the CUDA backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/matrix.h"
#include "tests/simt/cuda_fixture.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

class CudaMlpTest : public CudaBackendTest {
 protected:
  static constexpr int32_t kNeurons = 603, kHidden = 70;

  void Use(DType dtype) {
    host_.up = Weights(Random(kNeurons, kHidden, 11), Layout::kOutputRows, dtype, Random(1, kNeurons, 12));
    host_.down = Weights(Random(kHidden, kNeurons, 13), Layout::kInputRows, dtype, Random(1, kHidden, 14));
    w_ = Device(host_);
  }
  Matrix Mlp(const Matrix& x, const Selection& neurons = {}, bool skip_zeros = true, const Tensor& active = {}) {
    const Tensor y = Put(Matrix(x.rows, kHidden, 77.0f));
    cuda_->Mlp(y, Put(x), w_, neurons, skip_zeros, Put(Matrix(x.rows, kNeurons, kNaN)), active);
    return Got(y);
  }
  Matrix OnCpu(const Matrix& x, const Selection& neurons, const Tensor& active = {}) {
    const Tensor y = arena_.Put(Matrix(x.rows, kHidden, 77.0f));
    cpu_->Mlp(y, arena_.Put(x), host_, neurons, true, arena_.Put(Matrix(x.rows, kNeurons, kNaN)), active);
    return Get(y);
  }
  // A few, none, one, many.
  static Lists SomeLists(int64_t rows) {
    Lists lists;
    for (uint32_t r = 0; r < rows; ++r) {
      lists.push_back(r % 4 == 0   ? Sample(kNeurons, 0.1, r)
                      : r % 4 == 1 ? Sample(kNeurons, 0.4, r)
                      : r % 4 == 2 ? std::vector<int32_t>{}
                                   : std::vector<int32_t>{kNeurons - 1});
    }
    return lists;
  }

  MlpWeights host_, w_;
};
INSTANTIATE_TEST_SUITE_P(Orders, CudaMlpTest, testing::Values(0, 1, 2),
                         [](const auto& info) { return absl::StrCat("Order", info.param); });

TEST_P(CudaMlpTest, IsThatOfTheCpuForEverySelection) {
  for (const DType dtype : kWeightTypes) {
    Use(dtype);
    for (const int64_t rows : {1, 2, 4, 5, 16, 17, 33}) {
      const Matrix x = Random(rows, kHidden, 1);
      const Lists lists = SomeLists(rows);
      std::vector<int32_t> mixed(rows);
      for (int64_t r = 0; r < rows; ++r) mixed[r] = r % 3 != 1;
      for (const Selection& neurons :
           {Selection{}, arena_.Select({}), arena_.Select({kNeurons - 1}), arena_.Select(EveryOther(2, kNeurons, 5)),
            arena_.SelectRows(lists, kNeurons), arena_.SelectRows(lists, kNeurons, mixed),
            arena_.SelectRows(Lists(rows), kNeurons)}) {
        SCOPED_TRACE(testing::Message() << Name(dtype) << ", rows " << rows << ", "
                                        << (neurons.all() ? -1 : *neurons.count.row<int32_t>(0)) << " neurons");
        const Tensor counts = arena_.PutInts(std::vector<int32_t>(rows + 1, -1)), on = Device(counts);
        const Matrix want = OnCpu(x, neurons, counts);
        const Matrix got = Mlp(x, Device(neurons), true, on);
        const float scale = dtype == DType::kInt8 ? 4.0f : 1.0f;
        ExpectClose(got, want, Matrix(rows, kHidden, scale * 2000.0f), ToleranceOf(dtype) / 10);
        EXPECT_TRUE(SameBits(got, Mlp(x, Device(neurons), false)));
        // An activation next to zero may be zero for one of the two.
        const std::vector<int32_t> active = Ints(on);
        for (int64_t r = 0; r <= rows; ++r) EXPECT_NEAR(active[r], counts.row<int32_t>(0)[r], 1) << r;
      }
    }
  }
}

TEST_P(CudaMlpTest, AStrictRowComputesItsOwnNeuronsAndTheOthersTheUnion) {
  Use(DType::kFloat16);
  for (const int64_t rows : {4, 13}) {
    const Matrix x = Random(rows, kHidden, 1);
    const Lists lists = SomeLists(rows);
    const Matrix whole_list = Mlp(x, Device(arena_.Select(UnionOf(lists))));
    std::vector<int32_t> mixed(rows);
    for (int64_t r = 0; r < rows; ++r) mixed[r] = r % 3 != 1;
    for (const auto& strict : {std::vector<int32_t>{}, mixed}) {
      const Matrix y = Mlp(x, Device(arena_.SelectRows(lists, kNeurons, strict)));
      for (int64_t r = 0; r < rows; ++r) {
        const bool is_strict = strict.empty() || strict[r] != 0;
        EXPECT_TRUE(SameBits(RowsOf(y, r, 1), is_strict ? Mlp(RowsOf(x, r, 1), Device(arena_.Select(lists[r])))
                                                        : RowsOf(whole_list, r, 1)))
            << "row " << r;
      }
    }
  }
}

TEST_P(CudaMlpTest, SelectingWhatIsActiveIsDense) {
  for (const DType dtype : kWeightTypes) {
    Use(dtype);
    for (const int64_t rows : {1, 4, 13}) {
      const Matrix x = Random(rows, kHidden, 1);
      const Matrix hidden = LinearOn(*cuda_, x, w_.up);
      Lists active(rows);
      for (int64_t r = 0; r < rows; ++r) {
        for (int32_t n = 0; n < kNeurons; ++n) {
          if (hidden.at(r, n) > 0.0f) active[r].push_back(n);
        }
      }
      const Matrix dense = Mlp(x, {}, false);
      for (const bool skip_zeros : {true, false}) {
        EXPECT_TRUE(SameBits(Mlp(x, Device(arena_.SelectRows(active, kNeurons)), skip_zeros), dense)) << Name(dtype);
      }
      EXPECT_TRUE(SameBits(Mlp(x), dense));
    }
  }
}

TEST_P(CudaMlpTest, NotANumberPassesTheReluAndReachesOnlyRowsThatSelectedIt) {
  Use(DType::kBFloat16);
  Matrix x = Random(3, kHidden, 1);
  x.at(1, 3) = kNaN;
  const Matrix y = Mlp(x, Device(arena_.SelectRows({{1, 2}, {}, {5}}, kNeurons)));
  for (const int64_t r : {0, 1, 2}) EXPECT_FALSE(std::isnan(y.at(r, 0))) << "row " << r;
  EXPECT_TRUE(std::isnan(Mlp(x, Device(arena_.SelectRows({{1, 2}, {5}, {5}}, kNeurons))).at(1, 0)));
}

// Of rows that the library multiplies, the first ones of which are counted apart.
TEST_P(CudaMlpTest, CountsTheActiveNeuronsOfManyRows) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    Use(dtype);
    for (const int64_t rows : {40, 270}) {
      const Matrix x = Random(rows, kHidden, 1);
      for (const int64_t counted : {int64_t{0}, int64_t{3}, rows}) {
        const Tensor counts = arena_.PutInts(std::vector<int32_t>(counted + 1, -1)), on = Device(counts);
        const Matrix want = OnCpu(x, {}, counts);
        for (int step = 0; step < 2; ++step) {  // what is counted in has to be left as it was
          const Matrix got = Mlp(x, {}, false, on);
          ExpectClose(got, want, Matrix(rows, kHidden, 2000.0f), ToleranceOf(dtype) / 10);
          const std::vector<int32_t> active = Ints(on);
          for (int64_t r = 0; r <= counted; ++r) EXPECT_NEAR(active[r], counts.row<int32_t>(0)[r], 1) << r;
        }
      }
    }
  }
}

TEST_P(CudaMlpTest, AuditIsThatOfTheCpu) {
  for (const DType dtype : {DType::kFloat16, DType::kInt8}) {
    Use(dtype);
    const Matrix x = Random(6, kHidden, 1);
    Matrix worth = Random(1, kNeurons, 5);
    for (float& value : worth.values) value = std::abs(value);
    for (const Selection& neurons : {Selection{}, arena_.SelectRows(SomeLists(6), kNeurons, {0, 1, 0, 1, 0, 1})}) {
      const Tensor want = arena_.Put(Matrix(6, kAuditFields)), got = Put(Matrix(6, kAuditFields));
      cpu_->Audit(want, arena_.Put(x), host_.up, arena_.Put(worth), neurons, arena_.Put(Matrix(6, kNeurons, kNaN)));
      cuda_->Audit(got, Put(x), w_.up, Put(worth), Device(neurons), Put(Matrix(6, kNeurons, kNaN)));
      const Matrix w = Get(want), g = Got(got);
      for (int64_t r = 0; r < 6; ++r) {
        EXPECT_EQ(g.at(r, kAuditSelected), w.at(r, kAuditSelected));
        EXPECT_NEAR(g.at(r, kAuditActive), w.at(r, kAuditActive), 1);
        EXPECT_NEAR(g.at(r, kAuditHits), w.at(r, kAuditHits), 1);
        EXPECT_NEAR(g.at(r, kAuditMass), w.at(r, kAuditMass), 1e-5f * w.at(r, kAuditMass));
        EXPECT_NEAR(g.at(r, kAuditMissedMass), w.at(r, kAuditMissedMass), 1e-5f * w.at(r, kAuditMass));
      }
    }
  }
}

}  // namespace
}  // namespace dejavu
