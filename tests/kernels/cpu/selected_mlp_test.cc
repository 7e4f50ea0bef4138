// The MLP over selected neurons in the CPU backend, and what Audit says of a selection. A row gets the same bits
// whoever shares its step, and what it leaves out without loss changes none of them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/backend.h"
#include "tests/kernels/cpu/cpu_fixture.h"
#include "tests/kernels/matrix.h"

namespace dejavu {
namespace {

using Lists = std::vector<std::vector<int32_t>>;  // what each row selects

constexpr int32_t kNone = std::numeric_limits<int32_t>::min();  // what no op writes

Matrix RowOf(const Matrix& m, int64_t r) { return RowsOf(m, r, 1); }

class CpuSelectedMlpTest : public CpuMlpFixture {
 protected:
  // Activations of the whole up-projection, bit by bit those of the Mlp.
  Matrix Activations(const Matrix& x) {
    Matrix hidden = Linear(x, w_.up);
    for (float& h : hidden.values) h = std::max(h, 0.0f);
    return hidden;
  }

  // The neurons of each row whose activation is not zero.
  static Lists Active(const Matrix& hidden) {
    Lists lists(hidden.rows);
    for (int64_t r = 0; r < hidden.rows; ++r) {
      for (int32_t n = 0; n < hidden.cols; ++n) {
        if (hidden.at(r, n) != 0.0f) lists[r].push_back(n);
      }
    }
    return lists;
  }
};
INSTANTIATE_TEST_SUITE_P(Targets, CpuSelectedMlpTest, EveryTargetAndThreads(), TargetAndThreads);

constexpr int32_t kNeurons = 603;

// Lists of every kind: a few, none, one, many, as many rows as asked for.
Lists SomeLists(int64_t rows) {
  Lists lists;
  for (uint32_t r = 0; r < rows; ++r) {
    switch (r % 4) {
      case 0:
        lists.push_back(Sample(kNeurons, 0.1, r));
        break;
      case 1:
        lists.push_back(Sample(kNeurons, 0.4, r));
        break;
      case 2:
        lists.emplace_back();
        break;
      default:
        lists.push_back({kNeurons - 1});
    }
  }
  return lists;
}

TEST_P(CpuSelectedMlpTest, AStrictRowComputesItsOwnNeuronsAndTheOthersTheUnion) {
  for (const DType dtype : {DType::kBFloat16, DType::kInt8}) {
    Use(70, kNeurons, dtype);
    for (const int64_t rows : {1, 4, 13}) {
      const Matrix x = Random(rows, 70, 1);
      const Lists lists = SomeLists(rows);
      const Matrix whole_list = Mlp(x, arena_.Select(UnionOf(lists)));
      std::vector<int32_t> mixed(rows);
      for (int64_t r = 0; r < rows; ++r) mixed[r] = r % 3 != 1;
      for (const auto& strict :
           {std::vector<int32_t>{}, std::vector<int32_t>(rows, 1), std::vector<int32_t>(rows, 0), mixed}) {
        for (const bool skip_zeros : {true, false}) {
          const Matrix y = Mlp(x, arena_.SelectRows(lists, kNeurons, strict), skip_zeros);
          for (int64_t r = 0; r < rows; ++r) {
            SCOPED_TRACE(testing::Message() << Name(dtype) << ", row " << r << " of " << rows << ", skip_zeros "
                                            << skip_zeros << ", strict " << testing::PrintToString(strict));
            const bool is_strict = strict.empty() || strict[r] != 0;
            EXPECT_TRUE(
                SameBits(RowOf(y, r), is_strict ? Mlp(RowOf(x, r), arena_.Select(lists[r])) : RowOf(whole_list, r)));
          }
        }
      }
    }
  }
}

TEST_P(CpuSelectedMlpTest, SelectingNoneGivesTheBiasAndSelectingAllIsDense) {
  Use(70, kNeurons, DType::kInt8);
  for (const int64_t rows : {1, 4, 13}) {
    const Matrix x = Random(rows, 70, 1);
    const Matrix dense = Mlp(x);
    Matrix bias(rows, 70);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(w_.down.bias.row<float>(0), 70, &bias.at(r, 0));
    for (const bool skip_zeros : {true, false}) {
      EXPECT_TRUE(SameBits(Mlp(x, {}, skip_zeros), dense));
      const Selection none = arena_.SelectRows(Lists(rows), kNeurons);
      EXPECT_TRUE(SameBits(Mlp(x, none, skip_zeros), bias)) << "rows " << rows;
      const Selection all = arena_.SelectRows(Lists(rows, EveryOther(0, kNeurons, 1)), kNeurons);
      EXPECT_TRUE(SameBits(Mlp(x, all, skip_zeros), dense)) << "rows " << rows;
    }
  }
}

TEST_P(CpuSelectedMlpTest, SelectingWhatIsActiveIsDense) {
  for (const DType dtype : kWeightTypes) {
    Use(70, kNeurons, dtype);
    for (const int64_t rows : {1, 4, 13}) {
      const Matrix x = Random(rows, 70, 1);
      const Lists active = Active(Activations(x));
      for (const bool skip_zeros : {true, false}) {
        EXPECT_TRUE(SameBits(Mlp(x, arena_.SelectRows(active, kNeurons), skip_zeros), Mlp(x)))
            << Name(dtype) << ", rows " << rows;
      }
    }
  }
}

TEST_P(CpuSelectedMlpTest, CountsActiveNeuronsOfTheFirstRowsAndOfAnyRow) {
  Use(70, kNeurons, DType::kBFloat16);
  for (const int64_t rows : {1, 4, 13}) {
    const Matrix x = Random(rows, 70, 1);
    const Lists active = Active(Activations(x));
    const Lists lists = SomeLists(rows);
    std::vector<int32_t> strict(rows);
    for (int64_t r = 0; r < rows; ++r) strict[r] = r % 3 != 1;
    const std::vector<int32_t> all = EveryOther(0, kNeurons, 1);
    const std::vector<int32_t> in_any = UnionOf(lists);
    Lists mixed = lists;
    for (int64_t r = 0; r < rows; ++r) mixed[r] = strict[r] != 0 ? lists[r] : in_any;
    const struct {
      Selection selection;
      Lists computed;
    } cases[] = {{{}, Lists(rows, all)},
                 {arena_.Select(in_any), Lists(rows, in_any)},
                 {arena_.SelectRows(lists, kNeurons), lists},
                 {arena_.SelectRows(lists, kNeurons, strict), mixed},
                 {arena_.SelectRows(Lists(rows), kNeurons), Lists(rows)}};
    for (const auto& [selection, computed] : cases) {
      Lists counted(rows);
      for (int64_t r = 0; r < rows; ++r) {
        std::set_intersection(active[r].begin(), active[r].end(), computed[r].begin(), computed[r].end(),
                              std::back_inserter(counted[r]));
      }
      for (const int64_t n : {int64_t{0}, rows / 2, rows}) {
        for (const bool skip_zeros : {true, false}) {
          const Tensor counts = arena_.PutInts(std::vector<int32_t>(n + 1, kNone));
          const Matrix y = Mlp(x, selection, skip_zeros, counts);
          for (int64_t r = 0; r < n; ++r) {
            EXPECT_EQ(counts.row<int32_t>(0)[r], std::ssize(counted[r])) << "row " << r << " of " << rows;
          }
          EXPECT_EQ(counts.row<int32_t>(0)[n], std::ssize(UnionOf(counted))) << n << " of " << rows << " rows counted";
          EXPECT_TRUE(SameBits(y, Mlp(x, selection))) << "counting changes the result";
        }
      }
    }
  }
}

TEST_P(CpuSelectedMlpTest, AnActivationThatIsNotANumberReachesOnlyTheRowsThatSelectedIt) {
  Use(70, kNeurons, DType::kBFloat16);
  Matrix x = Random(3, 70, 1);
  x.at(1, 3) = kNaN;  // all its activations
  const Matrix y = Mlp(x, arena_.SelectRows({{1, 2}, {}, {5}}, kNeurons));
  for (const int64_t r : {0, 1, 2}) EXPECT_FALSE(std::isnan(y.at(r, 0))) << "row " << r;
  EXPECT_TRUE(std::isnan(Mlp(x, arena_.SelectRows({{1, 2}, {5}, {5}}, kNeurons)).at(1, 0)));
}

class CpuAuditTest : public CpuSelectedMlpTest {
 protected:
  // In the order of AuditField.
  Matrix Audit(const Matrix& x, const Matrix& worth, const Selection& neurons) {
    const Tensor result = arena_.Put(Matrix(x.rows, kAuditFields, 77.0f));
    const Tensor hidden = arena_.Put(Matrix(x.rows, kNeurons, kNaN));
    backend_->Audit(result, arena_.Put(x), w_.up, arena_.Put(worth), neurons, hidden);
    return Get(result);
  }
};
INSTANTIATE_TEST_SUITE_P(Targets, CpuAuditTest, EveryTargetAndThreads(), TargetAndThreads);

TEST_P(CpuAuditTest, HoldsWhatARowSelectedAgainstWhatIsActive) {
  for (const DType dtype : {DType::kBFloat16, DType::kInt8}) {
    Use(70, kNeurons, dtype);
    const Matrix x = Random(6, 70, 1);
    Matrix worth = Random(1, kNeurons, 5);
    for (float& value : worth.values) value = std::abs(value);
    const Lists lists = SomeLists(6);
    const Matrix hidden = Activations(x);
    const Lists everything(6, EveryOther(0, kNeurons, 1));
    // Who is strict is no matter: an audit is about what the row selected itself.
    const Selection masked = arena_.SelectRows(lists, kNeurons, {0, 1, 0, 1, 0, 1});
    for (const auto& [selection, chosen] : {std::pair{masked, lists}, {Selection{}, everything}}) {
      const Matrix got = Audit(x, worth, selection);
      for (int64_t r = 0; r < x.rows; ++r) {
        SCOPED_TRACE(testing::Message() << Name(dtype) << ", row " << r);
        double active = 0.0, hits = 0.0, mass = 0.0, missed = 0.0;
        for (int32_t n = 0; n < kNeurons; ++n) {
          const double h = hidden.at(r, n);
          const bool hit = std::binary_search(chosen[r].begin(), chosen[r].end(), n);
          active += h != 0.0;
          hits += h != 0.0 && hit;
          mass += h * h * worth.at(0, n);
          missed += hit ? 0.0 : h * h * worth.at(0, n);
        }
        EXPECT_EQ(got.at(r, kAuditSelected), chosen[r].size());
        EXPECT_EQ(got.at(r, kAuditActive), active);
        EXPECT_EQ(got.at(r, kAuditHits), hits);
        EXPECT_NEAR(got.at(r, kAuditMass), mass, 1e-6 * mass);
        EXPECT_NEAR(got.at(r, kAuditMissedMass), missed, 1e-6 * mass);
      }
    }
  }
}

TEST_P(CpuAuditTest, MissesNothingWhereWhatIsActiveWasSelected) {
  Use(70, kNeurons, DType::kFloat16);
  const Matrix x = Random(3, 70, 1);
  const Lists active = Active(Activations(x));
  const Matrix got = Audit(x, Matrix(1, kNeurons, 1.0f), arena_.SelectRows(active, kNeurons));
  for (int64_t r = 0; r < 3; ++r) {
    EXPECT_EQ(got.at(r, kAuditHits), got.at(r, kAuditActive));
    EXPECT_EQ(got.at(r, kAuditSelected), got.at(r, kAuditActive));
    EXPECT_EQ(got.at(r, kAuditMissedMass), 0.0f);
  }
}

}  // namespace
}  // namespace dejavu
