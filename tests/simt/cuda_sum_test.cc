// The Sum kernels on their own, with parts that the backend has only in large models: rings and windows go round
// several times.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/float16.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/sum.cuh"
#include "tests/kernels/matrix.h"
#include "tests/simt/cuda_fixture.h"
#include "tests/simt/simt_testing.h"

namespace dejavu {
namespace {

struct Variant {
  simt::Kernel<cuda::SumParams> kernel;
  int rows;
  bool wide;
};
constexpr Variant kBFloat16Variants[] = {{cuda::SumBF16x1, 1, false},
                                         {cuda::SumBF16x4, 4, false},
                                         {cuda::SumBF16x8, 8, false},
                                         {cuda::SumBF16x16, 16, true}};
constexpr Variant kInt8Variants[] = {{cuda::SumI8x1, 1, false}, {cuda::SumI8x4, 4, false}, {cuda::SumI8x8, 8, true}};

struct alignas(16) Chunk {
  unsigned char bytes[16];
};

// y = W x + b on memory of its own. NaN in x where nothing may look.
template <typename W>
class SumCase {
 public:
  SumCase(int rows, int inputs, int outputs, int stride, int segment)
      : x(Random(rows, inputs, 1)), y(rows, outputs, 77.0f), bias_(Random(1, outputs, 2)) {
    const int slab = cuda::kSumRowBytes / static_cast<int>(sizeof(W)), slabs = (outputs + slab - 1) / slab;
    const int segments = (inputs + segment - 1) / segment;
    weight_.resize((int64_t{inputs} * stride * sizeof(W) + 15) / 16);
    const Matrix values = Random(inputs, stride, 3);
    for (int64_t i = 0; i < int64_t{inputs} * stride; ++i) Set(i, values.values[i]);
    for (int i = 0; i < inputs; ++i) scale_.push_back(0.25f + static_cast<float>(i % 3));
    partial_.resize(int64_t{segments} * rows * slabs * slab, kNaN);
    tickets_.resize(slabs + 1);
    p_.weight = weight_.data();
    p_.stride = stride;
    p_.sums.bias = bias_.values.data();
    p_.scale = sizeof(W) == 1 ? scale_.data() : nullptr;
    p_.inputs = inputs;
    p_.outputs = outputs;
    p_.group = 1;
    p_.segment = segment;
    p_.sums.segments = segments;
    p_.vectors = stride * sizeof(W) % 16 == 0;
    p_.sums.partial = {partial_.data(), int64_t{slabs} * slab};
  }

  // Rows first ... first + rows - 1, after `launches`.
  Matrix Run(const Variant& v, int first, int rows, uint64_t order, bool skip_zeros = false,
             std::vector<simt::Prepared> launches = {}) {
    const int slab = cuda::kSumRowBytes / static_cast<int>(sizeof(W));
    p_.x = {x.values.data() + int64_t{first} * x.cols, x.cols};
    p_.y = {y.values.data() + int64_t{first} * y.cols, y.cols};
    p_.sums.rows = p_.all_rows = rows;
    p_.skip_zeros = skip_zeros;
    const bool joins = rows > v.rows || v.rows > 4;
    p_.tickets = joins ? nullptr : tickets_.data();
    const simt::Dim3 grid = {static_cast<uint32_t>((rows + v.rows - 1) / v.rows),
                             static_cast<uint32_t>(tickets_.size() - 1), static_cast<uint32_t>(p_.sums.segments)};
    launches.push_back(simt::Prepare(v.kernel, p_,
                                     {.grid = grid,
                                      .block = cuda::kBlockThreads,
                                      .shared_bytes = static_cast<size_t>(cuda::SumSharedBytes(v.wide, v.rows, slab)),
                                      .order = order,
                                      .overlaps = true}));
    const absl::Status status = simt::Run(launches);
    EXPECT_TRUE(status.ok()) << status << " in order " << order;
    if (joins) {
      const simt::Dim3 pieces = {static_cast<uint32_t>((y.cols + 255) / 256), static_cast<uint32_t>(rows)};
      simt::ExpectRuns(cuda::JoinSums, p_, {.grid = pieces, .block = cuda::kBlockThreads, .order = order});
    }
    return RowsOf(y, first, rows);
  }

  void Select(const std::vector<int32_t>& list, int group, bool early) {
    list_ = list;
    count_ = static_cast<int32_t>(list.size());
    list_.resize(list_.size() + 1, -1);  // never empty
    p_.selected.list = list_.data();
    p_.selected.count = &count_;
    p_.group = group;
    p_.list_early = early;
  }
  void Count(std::vector<int32_t>* active) {
    p_.active = active != nullptr ? active->data() : nullptr;
    p_.counted = active != nullptr ? static_cast<int32_t>(active->size()) - 1 : 0;
  }

  // In double, of the inputs for which `chosen` is.
  Matrix Reference(const std::function<bool(int)>& chosen = [](int) { return true; }) const {
    Matrix sums(x.rows, y.cols);
    for (int64_t r = 0; r < x.rows; ++r) {
      for (int64_t c = 0; c < y.cols; ++c) {
        double sum = bias_.at(0, c);
        for (int i = 0; i < x.cols; ++i) {
          if (chosen(i)) sum += double{x.at(r, i)} * (sizeof(W) == 1 ? scale_[i] : 1.0f) * Get(i * p_.stride + c);
        }
        sums.at(r, c) = static_cast<float>(sum);
      }
    }
    return sums;
  }

  Matrix x, y;

 private:
  void Set(int64_t i, float value) {
    if constexpr (sizeof(W) == 1) {
      reinterpret_cast<int8_t*>(weight_.data())[i] = static_cast<int8_t>(value * 127.0f);
    } else {
      const uint16_t bits = cuda::FloatToBFloat16(value);
      std::memcpy(weight_.data()->bytes + 2 * i, &bits, 2);
    }
  }
  float Get(int64_t i) const {
    if constexpr (sizeof(W) == 1) return reinterpret_cast<const int8_t*>(weight_.data())[i];
    uint16_t bits;
    std::memcpy(&bits, weight_.data()->bytes + 2 * i, 2);
    return FloatFromBFloat16(bits);
  }

  Matrix bias_;
  std::vector<Chunk> weight_;
  std::vector<float> scale_, partial_;
  std::vector<uint32_t> tickets_;
  std::vector<int32_t> list_;
  int32_t count_ = 0;
  cuda::SumParams p_ = {};
};

// As ReLU leaves it: most values are zero, and some inputs in all rows.
void MakeSparse(Matrix& x, uint32_t seed) {
  std::mt19937 random(seed);
  for (int64_t i = 0; i < x.cols; ++i) {
    const uint32_t density = random() % 4;  // of 8
    for (int64_t r = 0; r < x.rows; ++r) {
      if (random() % 8 >= density) x.at(r, i) = 0.0f;
    }
  }
}

TEST_P(CudaBackendTest, UpTo16RowsReadAWeightOfInputRowsOnce) {
  const LinearWeights w = Device(Weights(Random(70, 300, 2), Layout::kInputRows, DType::kBFloat16));
  const cuda::Kernel kernels[] = {cuda::kSumBF16x1, cuda::kSumBF16x4, cuda::kSumBF16x8, cuda::kSumBF16x16};
  for (int64_t rows = 1; rows <= 16; ++rows) {
    simt::GetEmulation().launches.assign(cuda::kKernels, 0);
    LinearOn(*cuda_, Random(rows, 300, 1), w);
    const int expected = rows == 1 ? 0 : rows <= 4 ? 1 : rows <= 8 ? 2 : 3;
    for (int k = 0; k < 4; ++k) EXPECT_EQ(Launches(kernels[k]), k == expected) << rows << " rows";
    EXPECT_EQ(Launches(cuda::kJoinSums), rows > 3) << rows << " rows";
  }
}

class CudaSumTest : public testing::TestWithParam<uint64_t> {
 protected:
  uint64_t order() const { return GetParam(); }

  template <typename W, size_t N>
  void RowsAlone(const Variant (&variants)[N], int inputs, int outputs, int stride, int segment) {
    SumCase<W> c(16, inputs, outputs, stride, segment);
    MakeSparse(c.x, 5);
    for (int64_t i = 0; i < c.x.cols; ++i) c.x.at(3, i) = 0.5f;  // one row without zeros
    const Variant& widest = variants[N - 1];
    const Matrix all = c.Run(widest, 0, 16, order());
    ExpectClose(all, c.Reference(), sizeof(W) == 1 ? 1.0f : 1e-2f);
    EXPECT_TRUE(SameBits(c.Run(widest, 0, 16, order(), true), all)) << "without zeros";
    for (const Variant& v : variants) {
      for (const bool skip_zeros : {false, true}) {
        const int rows = v.rows > 1 ? v.rows - 1 : 1;
        for (const int first : {0, 3, 16 - rows}) {
          if (first + rows > 16) continue;
          EXPECT_TRUE(SameBits(c.Run(v, first, rows, order(), skip_zeros), RowsOf(all, first, rows)))
              << v.rows << " rows from " << first << (skip_zeros ? " without zeros" : "");
        }
      }
    }
  }
  static void ExpectClose(const Matrix& got, const Matrix& want, float tolerance) {
    for (int64_t r = 0; r < got.rows; ++r) {
      for (int64_t c = 0; c < got.cols; ++c) ASSERT_NEAR(got.at(r, c), want.at(r, c), tolerance) << r << ", " << c;
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Orders, CudaSumTest, testing::Values(0, 1, 2),
                         [](const auto& info) { return absl::StrCat("Order", info.param); });

TEST_P(CudaSumTest, ARowIsTheSameAloneAndAmong16WithAndWithoutZeros) {
  RowsAlone<uint16_t>(kBFloat16Variants, 2003, 100, 104, 2048);  // one segment, parts of 256
  RowsAlone<uint16_t>(kBFloat16Variants, 1501, 261, 264, 832);   // two slabs, two segments
  RowsAlone<uint16_t>(kBFloat16Variants, 701, 37, 37, 704);      // rows that do not begin at 16 bytes
  RowsAlone<int8_t>(kInt8Variants, 1501, 77, 80, 832);
  RowsAlone<int8_t>(kInt8Variants, 701, 513, 515, 704);
}

struct BringParams {
  const float* from;
  float* to;
  int count;
};
DJ_KERNEL(BringX, BringParams, cuda::kBlockThreads) {
  cuda::GridWait();
  cuda::GridLaunchDependents();
  for (int i = static_cast<int>(threadIdx.x); i < p.count; i += cuda::kBlockThreads) p.to[i] = p.from[i];
}

// The launch before brings x; the list is older, and whoever reads x early reads NaN.
TEST_P(CudaSumTest, FillsItsRingFromAnOldListBeforeTheLaunchBeforeHasEnded) {
  for (const int group : {1, 7, 128}) {
    for (const bool skip_zeros : {false, true}) {
      const int inputs = group == 128 ? 1280 : 1400, units = inputs / group;
      for (const auto& list :
           {Sample(units, 0.3, 1), Sample(units, 0.9, 2), std::vector<int32_t>{units - 1}, std::vector<int32_t>{}}) {
        std::vector<bool> chosen(inputs);
        for (const int32_t unit : list) std::fill_n(chosen.begin() + unit * group, group, true);
        SumCase<uint16_t> c(8, inputs, 70, 72, 704);
        MakeSparse(c.x, 6);
        Matrix x = c.x;
        for (int64_t r = 0; r < 8; ++r) {
          for (int i = 0; i < inputs; ++i) {
            if (chosen[i]) continue;
            x.at(r, i) = 0.0f;
            c.x.at(r, i) = kNaN;
          }
        }
        const Matrix given = c.x;
        std::vector<int32_t> everything(inputs);
        std::iota(everything.begin(), everything.end(), 0);
        for (const Variant& v : {kBFloat16Variants[0], kBFloat16Variants[2]}) {
          c.x = x;
          c.Select(everything, 1, false);
          const Matrix want = c.Run(v, 0, v.rows, order());
          for (const bool early : {false, true}) {
            SCOPED_TRACE(testing::Message() << list.size() << " groups of " << group << ", early " << early << ", rows "
                                            << v.rows << ", skip " << skip_zeros);
            c.Select(list, group, early);
            c.x = Matrix(8, inputs, kNaN);
            const std::vector<simt::Prepared> before = {
                simt::Prepare(BringX, {given.values.data(), c.x.values.data(), static_cast<int>(given.values.size())},
                              {.block = cuda::kBlockThreads, .order = order()})};
            EXPECT_TRUE(SameBits(c.Run(v, 0, v.rows, order(), skip_zeros, before), want));
          }
        }
      }
    }
  }
}

TEST_P(CudaSumTest, CountsWhatIsActive) {
  SumCase<uint16_t> c(16, 1501, 300, 304, 832);
  MakeSparse(c.x, 7);
  const std::vector<int32_t> list = Sample(1501, 0.5, 3);
  std::vector<int32_t> want(12);
  for (const int32_t i : list) {
    bool any = false;
    for (int r = 0; r < 16; ++r) {
      any = any || c.x.at(r, i) != 0.0f;
      if (r < 11) want[r] += c.x.at(r, i) != 0.0f;
    }
    want[11] += any;
  }
  c.Select(list, 1, true);
  for (const Variant& v : {kBFloat16Variants[1], kBFloat16Variants[3]}) {  // four groups of rows, one
    for (const bool skip_zeros : {false, true}) {
      std::vector<int32_t> active(12);
      c.Count(&active);
      c.Run(v, 0, 16, order(), skip_zeros);
      EXPECT_EQ(active, want);
    }
  }
}

}  // namespace
}  // namespace dejavu
