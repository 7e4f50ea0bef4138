// Every op of the CUDA backend over emulated kernels against the CPU backend, in three orders of blocks and threads.
// Where both add integers the results are the same bit by bit; elsewhere as close as two orders of a float sum are. And
// on its own: a row's bits depend on that row alone, what is left out without loss changes none of them, and launches
// are fused.
#include "kernels/cuda/cuda_backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/params.h"
#include "tests/kernels/matrix.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

using Layout = LinearWeights::Layout;
using Lists = std::vector<std::vector<int32_t>>;
using testing::HasSubstr;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr DType kWeightTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8};

// Of a sum's absolute terms. What is multiplied is float32 in two halves, or rounded to 14 bits by the CPU.
float ToleranceOf(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return 1e-4f;
    case DType::kInt8:
      return 4e-4f;
    default:
      return 1e-5f;
  }
}

// Tensors of a test on the host and their copies on the device.
class CudaBackendTest : public testing::TestWithParam<uint64_t> {
 protected:
  CudaBackendTest() {
    simt::GetEmulation() = simt::Emulation();
    simt::GetEmulation().order = GetParam();
    auto cuda = MakeCudaBackend(simt::ModuleUnderTest(), 0);
    EXPECT_TRUE(cuda.ok()) << cuda.status();
    cuda_ = *std::move(cuda);
    auto cpu = CreateCpuBackend({.threads = 1, .pin = false});
    EXPECT_TRUE(cpu.ok()) << cpu.status();
    cpu_ = *std::move(cpu);
  }

  Tensor Device(const Tensor& host) {
    if (host.empty()) return host;
    Tensor t = host;
    const int64_t elements = host.rows == 0 ? 0 : (host.rows - 1) * host.stride + host.cols;
    auto buffer = cuda_->Allocate(elements * SizeOf(host.dtype));
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    t.data = buffer->data();
    buffers_.push_back(*std::move(buffer));
    if (host.bytes() == 0) return t;
    std::vector<char> packed(host.bytes());
    cpu_->Download(packed.data(), host);
    cuda_->Upload(t, packed.data());
    return t;
  }
  LinearWeights Device(LinearWeights w) {
    w.weight = Device(w.weight);
    w.bias = Device(w.bias);
    w.scale = Device(w.scale);
    return w;
  }
  MlpWeights Device(const MlpWeights& w) { return {Device(w.up), Device(w.down)}; }
  Selection Device(const Selection& s) {
    return {Device(s.indices), Device(s.count), Device(s.masks), Device(s.strict)};
  }
  Tensor Put(const Matrix& m) { return Device(arena_.Put(m)); }

  // A copy on the host.
  Tensor Host(const Tensor& device) {
    Tensor host = arena_.Make(device.dtype, device.rows, device.cols);
    cuda_->Download(host.data, device);
    cuda_->Synchronize();
    return host;
  }
  Matrix Got(const Tensor& device) { return Get(Host(device)); }
  std::vector<int32_t> Ints(const Tensor& device) {
    const Tensor host = Host(device);
    return {host.row<int32_t>(0), host.row<int32_t>(0) + host.rows * host.cols};
  }

  LinearWeights Weights(const Matrix& w, Layout layout, DType dtype, const Matrix& bias = {}, int64_t padding = 0) {
    return arena_.Weights(w, layout, dtype, bias, padding);
  }

  // Of host weights, [outputs, inputs].
  static Matrix ValuesOf(const LinearWeights& w) {
    Matrix values = Get(w.weight);
    for (int64_t r = 0; r < values.rows && !w.scale.empty(); ++r) {
      for (int64_t c = 0; c < values.cols; ++c) values.at(r, c) *= w.scale.row<float>(0)[r];
    }
    return w.layout == Layout::kOutputRows ? values : Transposed(values);
  }

  // What the terms of x W^T add up to without their signs.
  static Matrix MagnitudeOf(const Matrix& x, const LinearWeights& w) {
    Matrix magnitude;
    ReferenceLinear(x, ValuesOf(w), {}, &magnitude);
    return magnitude;
  }

  // Outputs that are left untouched are 77.
  Matrix LinearOn(Backend& backend, const Matrix& x, const LinearWeights& w, const Selection& selected = {},
                  int64_t group = 1) {
    const bool cpu = &backend == cpu_.get();
    const Tensor y = arena_.Put(Matrix(x.rows, w.outputs(), 77.0f));
    if (cpu) {
      backend.Linear(y, arena_.Put(x), w, selected, group);
      return Get(y);
    }
    const Tensor on_device = Device(y);
    backend.Linear(on_device, Put(x), w, selected, group);
    return Got(on_device);
  }

  static void ExpectClose(const Matrix& got, const Matrix& want, const Matrix& magnitude, float tolerance) {
    ASSERT_EQ(got.rows, want.rows);
    ASSERT_EQ(got.cols, want.cols);
    for (int64_t r = 0; r < got.rows; ++r) {
      for (int64_t c = 0; c < got.cols; ++c) {
        ASSERT_NEAR(got.at(r, c), want.at(r, c), tolerance * magnitude.at(r, c)) << "row " << r << ", column " << c;
      }
    }
  }
  static void ExpectClose(const Matrix& got, const Matrix& want, float tolerance) {
    ExpectClose(got, want, Matrix(want.rows, want.cols, 1.0f), tolerance);
  }

  int64_t Launches(cuda::Kernel kernel) const { return simt::GetEmulation().launches[kernel]; }

  Arena arena_;
  std::unique_ptr<Backend> cuda_, cpu_;
  std::vector<Buffer> buffers_;
};
INSTANTIATE_TEST_SUITE_P(Orders, CudaBackendTest, testing::Values(0, 1, 2),
                         [](const auto& info) { return absl::StrCat("Order", info.param); });

struct Shape {
  int64_t inputs;
  int64_t outputs;
  int64_t padding;
};

// Short rows, windows and segments cut short, rows that do not begin at 16 bytes, padded ones.
constexpr Shape kShapes[] = {{1, 1, 0}, {5, 3, 0}, {64, 96, 0}, {301, 77, 0}, {320, 33, 32}, {520, 130, 0}};

TEST_P(CudaBackendTest, LinearIsThatOfTheCpuAndARowDependsOnItselfAlone) {
  for (const DType dtype : kWeightTypes) {
    for (const Layout layout : {Layout::kOutputRows, Layout::kInputRows}) {
      for (const Shape shape : kShapes) {
        SCOPED_TRACE(testing::Message() << Name(dtype) << (layout == Layout::kOutputRows ? " output" : " input")
                                        << " rows, " << shape.inputs << " -> " << shape.outputs);
        const Matrix x = Random(19, shape.inputs, 1);
        const Matrix bias = shape.inputs == 64 ? Matrix() : Random(1, shape.outputs, 3);
        const LinearWeights w = Weights(Random(shape.outputs, shape.inputs, 2), layout, dtype, bias, shape.padding);
        const LinearWeights on_device = Device(w);
        const Matrix want = LinearOn(*cpu_, x, w);
        const Matrix all = LinearOn(*cuda_, x, on_device);
        if (dtype == DType::kInt8 && layout == Layout::kOutputRows) {
          EXPECT_TRUE(SameBits(all, want)) << "sums of integers";
        }
        ExpectClose(all, want, MagnitudeOf(x, w), ToleranceOf(dtype));
        for (const int64_t rows : {1, 2, 3, 4, 5, 7, 8, 9, 13, 16}) {
          const int64_t first = 19 - rows - rows % 3;
          EXPECT_TRUE(SameBits(RowsOf(all, first, rows), LinearOn(*cuda_, RowsOf(x, first, rows), on_device)))
              << rows << " rows";
        }
      }
    }
  }
}

// So many inputs that x passes through shared memory in chunks.
TEST_P(CudaBackendTest, ARowDependsOnItselfAloneAlsoWhereXDoesNotFitSharedMemory) {
  constexpr int64_t kInputs = 6200;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kInt8}) {
    SCOPED_TRACE(Name(dtype));
    const LinearWeights w = Weights(Random(83, kInputs, 2), Layout::kOutputRows, dtype, Random(1, 83, 3), 8);
    const LinearWeights on_device = Device(w);
    const LinearWeights small = Weights(Random(35, kInputs, 5), Layout::kOutputRows, DType::kInt8);
    const Matrix x = Random(16, kInputs, 1);
    const Tensor y = Put(Matrix(16, 83)), along = Put(Matrix(16, 35));
    const LinearWeights riding = Device(small);
    cuda_->Linear(y, Put(x), on_device, {}, 1, {along, &riding});
    const Matrix all = Got(y);
    ExpectClose(all, LinearOn(*cpu_, x, w), MagnitudeOf(x, w), ToleranceOf(dtype));
    EXPECT_TRUE(SameBits(Got(along), LinearOn(*cpu_, x, small)));
    for (const int64_t rows : {1, 6}) {
      EXPECT_TRUE(SameBits(RowsOf(all, 3, rows), LinearOn(*cuda_, RowsOf(x, 3, rows), on_device))) << rows << " rows";
    }
  }
  EXPECT_GT(Launches(cuda::kLinearF16), 0);
  EXPECT_GT(Launches(cuda::kLinearF16Chunked), 0);
  EXPECT_GT(Launches(cuda::kLinearI8Chunked), 0);
}

TEST_P(CudaBackendTest, LinearKeepsToItsViews) {
  for (const Layout layout : {Layout::kOutputRows, Layout::kInputRows}) {
    for (const int64_t rows : {3, 20}) {
      const Matrix x = Random(rows, 37, 1);
      const LinearWeights packed = Device(Weights(Random(41, 37, 2), layout, DType::kBFloat16));
      const LinearWeights strided = Device(Weights(Random(41, 37, 2), layout, DType::kBFloat16, {}, 5));
      Tensor wide_x = arena_.Put(Matrix(rows, 50, kNaN));
      for (int64_t r = 0; r < rows; ++r) std::copy_n(&x.values[r * 37], 37, wide_x.row<float>(r) + 9);
      const Tensor wide_y = Put(Matrix(rows, 45, 5.0f));
      cuda_->Linear(wide_y.Cols(2, 41), Device(wide_x).Cols(9, 37), strided);
      EXPECT_TRUE(SameBits(Got(wide_y.Cols(2, 41)), LinearOn(*cuda_, x, packed)));
      EXPECT_TRUE(SameBits(Got(wide_y.Cols(0, 2)), Matrix(rows, 2, 5.0f)));
      EXPECT_TRUE(SameBits(Got(wide_y.Cols(43, 2)), Matrix(rows, 2, 5.0f)));
    }
  }
}

TEST_P(CudaBackendTest, LinearComputesTheSelectedOutputsAndTouchesNoOthers) {
  constexpr int32_t kGroups = 45;
  for (const DType dtype : kWeightTypes) {
    for (const int64_t group : {1, 7}) {
      const LinearWeights w =
          Device(Weights(Random(kGroups * group, 67, 2), Layout::kOutputRows, dtype, Random(1, kGroups * group, 3)));
      for (const auto& selected :
           {std::vector<int32_t>{}, {44}, EveryOther(1, kGroups, 3), EveryOther(0, kGroups, 1)}) {
        for (const int64_t rows : {1, 5, 17}) {
          SCOPED_TRACE(testing::Message()
                       << Name(dtype) << ", " << selected.size() << " groups of " << group << ", rows " << rows);
          const Matrix x = Random(rows, 67, 1);
          EXPECT_TRUE(SameBits(LinearOn(*cuda_, x, w, Device(arena_.Select(selected)), group),
                               OnlyGroups(LinearOn(*cuda_, x, w), selected, group, 77.0f)));
        }
      }
    }
  }
}

TEST_P(CudaBackendTest, LinearOverSelectedInputsLeavesTheOthersOut) {
  constexpr int64_t kGroups = 45;
  for (const int64_t group : {1, 7}) {
    const LinearWeights w =
        Weights(Random(75, kGroups * group, 2), Layout::kInputRows, DType::kFloat16, Random(1, 75, 5));
    const LinearWeights on_device = Device(w);
    for (const auto& selected : {std::vector<int32_t>{}, {44}, EveryOther(1, kGroups, 3), EveryOther(0, kGroups, 1)}) {
      for (const int64_t rows : {1, 5, 17}) {
        SCOPED_TRACE(testing::Message() << selected.size() << " groups of " << group << ", rows " << rows);
        const Matrix x = Random(rows, kGroups * group, 1);
        const Matrix chosen = OnlyGroups(x, selected, group, 0.0f);
        const Matrix got = LinearOn(*cuda_, x, on_device, Device(arena_.Select(selected)), group);
        ExpectClose(got, LinearOn(*cpu_, chosen, w), MagnitudeOf(x, w), 1e-5f);
        // Selected or zero: the same bits. The EXACT tier rests on this.
        EXPECT_TRUE(SameBits(got, LinearOn(*cuda_, chosen, on_device)));
        const Selection masked = Device(arena_.SelectRows(Lists(rows, selected), kGroups));
        EXPECT_TRUE(SameBits(got, LinearOn(*cuda_, x, on_device, masked, group)));
      }
    }
  }
}

TEST_P(CudaBackendTest, WhatRidesAlongIsTheSameAsAProductOfItsOwn) {
  const Matrix x = Random(5, 67, 1);
  for (const DType dtype : {DType::kInt8, DType::kFloat16}) {
    const LinearWeights w = Device(Weights(Random(65, 67, 2), Layout::kOutputRows, DType::kFloat16));
    const LinearWeights small = Device(Weights(Random(41, 67, 3), Layout::kOutputRows, dtype, Random(1, 41, 4)));
    for (const int64_t rows : {1, 5}) {
      const Tensor y = Put(Matrix(rows, 65, 77.0f)), along = Put(Matrix(rows, 41, 77.0f));
      const int64_t before = simt::GetEmulation().all_launches;
      cuda_->Linear(y, Put(RowsOf(x, 0, rows)), w, {}, 1, {along, &small});
      EXPECT_EQ(simt::GetEmulation().all_launches - before, dtype == DType::kInt8 ? 1 : 2);
      EXPECT_TRUE(SameBits(Got(y), LinearOn(*cuda_, RowsOf(x, 0, rows), w)));
      EXPECT_TRUE(SameBits(Got(along), LinearOn(*cuda_, RowsOf(x, 0, rows), small)));
    }
  }
}

TEST_P(CudaBackendTest, NotANumberAndInfinityStayInTheirRow) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (const Layout layout : {Layout::kOutputRows, Layout::kInputRows}) {
      SCOPED_TRACE(Name(dtype));
      Matrix x = Random(4, 50, 1);
      const LinearWeights w = Device(Weights(Matrix(33, 50, 1.0f), layout, dtype));
      x.at(3, 11) = 100000.0f;  // beyond float16
      const Matrix clean = LinearOn(*cuda_, x, w);
      EXPECT_NEAR(clean.at(3, 0), 100000.0f, 50.0f);
      x.at(0, 7) = kNaN;
      x.at(2, 49) = kInfinity;
      const Matrix y = LinearOn(*cuda_, x, w);
      for (int64_t o = 0; o < 33; ++o) {
        EXPECT_TRUE(std::isnan(y.at(0, o)));
        EXPECT_EQ(y.at(1, o), clean.at(1, o));
        EXPECT_EQ(y.at(2, o), kInfinity);
      }
    }
  }
}

TEST_P(CudaBackendTest, LayerNormAddEmbedAndGatherRowsAreThoseOfTheCpu) {
  for (const int64_t features : {1, 3, 64, 301, 2050}) {
    const Matrix x = Random(9, features, 1), y = Random(9, features, 2);
    const NormWeights norm = {arena_.Put(Random(1, features, 3)), arena_.Put(Random(1, features, 4)), 1e-5f};
    const NormWeights on_device = {Device(norm.weight), Device(norm.bias), norm.epsilon};
    const Tensor sum = arena_.Put(x), h = arena_.Put(Matrix(9, features));
    const Tensor device_sum = Put(x), device_h = Put(Matrix(9, features));
    cpu_->Add(sum, arena_.Put(y));
    cpu_->LayerNorm(h, sum, norm);
    const int64_t before = simt::GetEmulation().all_launches;
    cuda_->Add(device_sum, Put(y));
    cuda_->LayerNorm(device_h, device_sum, on_device);
    EXPECT_TRUE(SameBits(Got(device_sum), Get(sum)));
    if (features > 3) ExpectClose(Got(device_h), Get(h), 1e-4f);
    EXPECT_GE(simt::GetEmulation().all_launches - before, 1);
    const Tensor in_place = Put(x);
    cuda_->LayerNorm(in_place, in_place, on_device);
    const Tensor alone = Put(RowsOf(x, 4, 1));
    cuda_->LayerNorm(alone, alone, on_device);
    EXPECT_TRUE(SameBits(Got(alone), RowsOf(Got(in_place), 4, 1)));

    for (const DType dtype : kWeightTypes) {
      const EmbeddingWeights table = {arena_.Put(Random(10, features, 1), dtype),
                                      dtype == DType::kInt8 ? arena_.Put(Random(1, 10, 2)) : Tensor()};
      // The last two lie outside the table.
      const Tensor ids = arena_.PutInts({7, 0, -9, 8}), embedded = arena_.Put(Matrix(4, features, 0.5f));
      const Tensor on = Device(embedded);
      for (const bool accumulate : {false, true}) {
        cpu_->Embed(embedded, ids, table, 2, accumulate);
        cuda_->Embed(on, Device(ids), {Device(table.weight), Device(table.scale)}, 2, accumulate);
        EXPECT_TRUE(SameBits(Got(on), Get(embedded))) << Name(dtype);
      }
    }
    const Tensor gathered = Put(Matrix(3, features));
    cuda_->GatherRows(gathered, Put(y), Device(arena_.PutInts({8, 2, 2})));
    for (const auto& [to, from] : {std::pair{0, 8}, {1, 2}, {2, 2}}) {
      EXPECT_TRUE(SameBits(RowsOf(Got(gathered), to, 1), RowsOf(y, from, 1)));
    }
  }
}

// What the library does, from 33 rows on.
TEST_P(CudaBackendTest, ProductsOfManyRowsAreThoseOfTheCpu) {
  for (const DType dtype : kWeightTypes) {
    for (const Layout layout : {Layout::kOutputRows, Layout::kInputRows}) {
      SCOPED_TRACE(testing::Message() << Name(dtype) << (layout == Layout::kOutputRows ? " output" : " input")
                                      << " rows");
      const Matrix x = Random(40, 83, 1);
      const LinearWeights w = Weights(Random(61, 83, 2), layout, dtype, Random(1, 61, 3), 5);
      const bool halves = dtype == DType::kFloat16 || dtype == DType::kBFloat16;
      const int64_t gemms = simt::GetEmulation().gemms;
      const Matrix got = LinearOn(*cuda_, x, Device(w));
      EXPECT_EQ(simt::GetEmulation().gemms - gemms, halves ? 2 : 0);
      ExpectClose(got, LinearOn(*cpu_, x, w), MagnitudeOf(x, w), ToleranceOf(dtype));
    }
  }
}

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

class CudaAttentionTest : public CudaBackendTest {
 protected:
  // Sequences of the given lengths whose blocks lie scattered; what was never written is NaN.
  void Fill(const std::vector<int32_t>& lengths, int32_t heads, int32_t head_dim, int32_t block_tokens, DType dtype) {
    const int32_t longest = *std::max_element(lengths.begin(), lengths.end());
    const int32_t per_sequence = (longest + block_tokens - 1) / block_tokens;
    const int32_t blocks = per_sequence * static_cast<int32_t>(lengths.size());
    table_ = arena_.Make(DType::kInt32, static_cast<int64_t>(lengths.size()), per_sequence);
    for (int32_t i = 0; i < blocks; ++i) table_.row<int32_t>(0)[i] = blocks - 1 - i;
    const Tensor empty = arena_.Put(Matrix(int64_t{blocks} * heads, int64_t{block_tokens} * head_dim, kNaN), dtype);
    keys_ = Device(empty);
    values_ = Device(empty);
    device_kv_ = {keys_.data, values_.data, blocks, heads, block_tokens, head_dim, dtype};
    kv_ = device_kv_;
    kv_.keys = empty.data;
    host_values_ = arena_.Put(Get(empty), dtype);
    kv_.values = host_values_.data;
    device_table_ = Device(table_);
    qkv_.clear();
    for (size_t s = 0; s < lengths.size(); ++s) {
      qkv_.push_back(Random(lengths[s], 3 * heads * head_dim, 20 + static_cast<uint32_t>(s)));
      std::vector<int32_t> positions(lengths[s]);
      std::iota(positions.begin(), positions.end(), 0);
      const std::vector<int32_t> sequences(positions.size(), static_cast<int32_t>(s));
      cpu_->WriteKv(kv_, arena_.Put(qkv_[s]), {arena_.PutInts(positions), arena_.PutInts(sequences), table_});
    }
  }
  // The first `positions[s]` of each sequence are in the cache of the device, too.
  void Cache(const std::vector<int32_t>& positions) {
    for (size_t s = 0; s < positions.size(); ++s) {
      if (positions[s] == 0) continue;
      std::vector<int32_t> own(positions[s]);
      std::iota(own.begin(), own.end(), 0);
      cuda_->WriteKv(device_kv_, Put(RowsOf(qkv_[s], 0, positions[s])),
                     Rows(own, std::vector<int32_t>(own.size(), static_cast<int32_t>(s))));
    }
    cuda_->Synchronize();
  }
  RowTable Rows(const std::vector<int32_t>& positions, const std::vector<int32_t>& sequences) {
    return {Device(arena_.PutInts(positions)), Device(arena_.PutInts(sequences)), device_table_};
  }
  Matrix QkvOf(const std::vector<int32_t>& positions, const std::vector<int32_t>& sequences) const {
    Matrix qkv(static_cast<int64_t>(positions.size()), qkv_[0].cols);
    for (size_t r = 0; r < positions.size(); ++r) {
      std::copy_n(&qkv_[sequences[r]].values[positions[r] * qkv.cols], qkv.cols, &qkv.values[r * qkv.cols]);
    }
    return qkv;
  }
  Matrix OnCpu(const std::vector<int32_t>& positions, const std::vector<int32_t>& sequences,
               const Selection& heads = {}) {
    const Matrix qkv = QkvOf(positions, sequences);
    const Tensor context = arena_.Put(Matrix(qkv.rows, qkv.cols / 3, 77.0f));
    const RowTable rows = {arena_.PutInts(positions), arena_.PutInts(sequences), table_};
    cpu_->Attention(context, arena_.Put(qkv), kv_, rows, kScale, heads);
    return Get(context);
  }
  Matrix OnDevice(const std::vector<int32_t>& positions, const std::vector<int32_t>& sequences, bool write,
                  const Selection& heads = {}) {
    const Tensor qkv = Put(QkvOf(positions, sequences));
    const Tensor context = Put(Matrix(qkv.rows, qkv.cols / 3, 77.0f));
    const RowTable rows = Rows(positions, sequences);
    const Selection on_device = Device(heads);
    cuda_->Synchronize();
    const int64_t before = simt::GetEmulation().all_launches;
    if (write) cuda_->WriteKv(device_kv_, qkv, rows);
    cuda_->Attention(context, qkv, device_kv_, rows, kScale, on_device);
    cuda_->Synchronize();
    launches_ = simt::GetEmulation().all_launches - before;
    return Got(context);
  }

  static constexpr float kScale = 0.7f;
  std::vector<Matrix> qkv_;
  Tensor table_, device_table_, keys_, values_, host_values_;
  KvLayer kv_, device_kv_;
  int64_t launches_ = 0;
};
INSTANTIATE_TEST_SUITE_P(Orders, CudaAttentionTest, testing::Values(0, 1, 2),
                         [](const auto& info) { return absl::StrCat("Order", info.param); });

TEST_P(CudaAttentionTest, OfRaggedRowsIsThatOfTheCpuAndKeysAndValuesAreWrittenOnTheWay) {
  for (const DType dtype : {DType::kFloat16, DType::kFloat32}) {
    for (const auto& [head_dim, block_tokens] :
         {std::pair{64, 16}, {80, 16}, {128, 16}, {5, 16}, {20, 3}, {64, 8}, {8, 200}, {1, 1}}) {
      SCOPED_TRACE(testing::Message() << Name(dtype) << ", head_dim " << head_dim << ", blocks of " << block_tokens);
      const std::vector<int32_t> lengths = {300, 1, 17, 256, 257};  // around blocks and splits
      Fill(lengths, 2, head_dim, block_tokens, dtype);
      Cache({299, 0, 16, 255, 256});
      const std::vector<int32_t> positions = {299, 0, 16, 255, 256}, sequences = {0, 1, 2, 3, 4};
      const Matrix want = OnCpu(positions, sequences), got = OnDevice(positions, sequences, true);
      EXPECT_EQ(launches_, 1);
      ExpectClose(got, want, 2e-5f);
      EXPECT_TRUE(SameBits(got, OnDevice(positions, sequences, false))) << "written and then read";
      EXPECT_TRUE(SameBits(RowsOf(got, 2, 1), OnDevice({16}, {2}, false))) << "a row alone";
    }
  }
}

TEST_P(CudaAttentionTest, DoesNotDependOnBlocksNorOnHowAPromptIsCut) {
  for (const DType dtype : {DType::kFloat16, DType::kFloat32}) {
    Matrix first;
    for (const int32_t block_tokens : {16, 1, 7, 200}) {
      SCOPED_TRACE(testing::Message() << Name(dtype) << ", blocks of " << block_tokens);
      Fill({40, 90}, 2, 24, block_tokens, dtype);
      std::vector<int32_t> positions(40);
      std::iota(positions.begin(), positions.end(), 0);
      const Matrix whole = OnDevice(positions, std::vector<int32_t>(40, 0), true);
      EXPECT_EQ(launches_, 2);
      if (block_tokens == 16) {
        first = whole;
        ExpectClose(whole, OnCpu(positions, std::vector<int32_t>(40, 0)), 2e-5f);
      }
      EXPECT_TRUE(SameBits(whole, first));
      // Chunks of up to 16 rows write and read at once, rows of longer ones share what they read; a row of another
      // sequence among them.
      Fill({40, 90}, 2, 24, block_tokens, dtype);
      Cache({0, 89});
      for (const auto& [start, chunk] : {std::pair{0, 1}, {1, 15}, {16, 3}, {19, 2}, {21, 19}}) {
        std::vector<int32_t> part(chunk), sequences(chunk, 0);
        std::iota(part.begin(), part.end(), start);
        part.insert(part.begin(), 89);
        sequences.insert(sequences.begin(), 1);
        const Matrix got = OnDevice(part, sequences, true);
        EXPECT_TRUE(SameBits(RowsOf(got, 1, chunk), RowsOf(whole, start, chunk))) << chunk << " from " << start;
      }
    }
  }
}

TEST_P(CudaAttentionTest, ARowAttendsWithItsOwnHeadsAndTheOthersAreZeroOrUntouched) {
  constexpr int32_t kHeads = 9, kHeadDim = 8;
  for (const auto& [prompt, write] : {std::pair{3, false}, {3, true}, {20, true}}) {
    Fill({70, 9, 1}, kHeads, kHeadDim, 16, DType::kFloat16);
    std::vector<int32_t> positions(prompt), sequences(prompt, 0), none(prompt + 2, 0), some;
    std::iota(positions.begin(), positions.end(), 70 - prompt);
    positions.insert(positions.end(), {8, 0});
    sequences.insert(sequences.end(), {1, 2});
    Cache(write ? std::vector<int32_t>{70 - prompt, 8, 0} : std::vector<int32_t>{70, 9, 1});
    const Lists of_rows = {{0, 5}, {}, {5, 8}, {1}, {0, 1, 2, 6}};  // nobody: 3, 4, 7
    Lists lists;
    for (int r = 0; r < prompt + 2; ++r) {
      lists.push_back(of_rows[r % 5]);
      some.push_back(r % 3 != 1);
    }
    for (const auto& strict : {std::vector<int32_t>{}, none, some}) {
      for (const Selection& heads : {arena_.SelectRows(lists, kHeads, strict), arena_.Select(UnionOf(lists)),
                                     arena_.Select({}), arena_.Select(EveryOther(0, kHeads, 1))}) {
        const Matrix want = OnCpu(positions, sequences, heads), got = OnDevice(positions, sequences, write, heads);
        ExpectClose(got, want, 2e-5f);
        for (size_t i = 0; i < want.values.size(); ++i) {
          const bool exact = want.values[i] == 77.0f || want.values[i] == 0.0f;
          EXPECT_TRUE(!exact || got.values[i] == want.values[i]) << i;
        }
      }
    }
    // Keys and values of heads that nobody selected are in the cache nevertheless.
    ExpectClose(OnDevice(positions, sequences, false), OnCpu(positions, sequences), 2e-5f);
  }
}

TEST_P(CudaAttentionTest, KeysAndValuesBeyondHalfPrecisionBecomeItsLargestNumber) {
  for (const auto& [value, want] : {std::pair{1e6f, 65504.0f}, {-1e6f, -65504.0f}, {kInfinity, 65504.0f}}) {
    Fill({1}, 1, 4, 16, DType::kFloat16);
    for (int64_t c = 8; c < 12; ++c) qkv_[0].at(0, c) = value;
    EXPECT_EQ(OnDevice({0}, {0}, true).at(0, 0), want);
    EXPECT_EQ(OnDevice({0}, {0}, false).at(0, 0), want);
  }
}

TEST_P(CudaAttentionTest, NotANumberInAKeyReachesTheRowsThatSeeIt) {
  Fill({100}, 1, 8, 16, DType::kFloat32);
  qkv_[0].at(80, 8) = kNaN;
  Cache({100});
  const Matrix context = OnDevice({79, 80, 99}, {0, 0, 0}, false);
  EXPECT_FALSE(std::isnan(context.at(0, 0)));
  EXPECT_TRUE(std::isnan(context.at(1, 0)));
  EXPECT_TRUE(std::isnan(context.at(2, 0)));
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

TEST_P(CudaBackendTest, UploadsAndDownloadsOfAnySizeAndStride) {
  for (const auto& [rows, cols, stride] :
       {std::tuple{3, 5, 8}, {1, 1, 1}, {700, 3001, 3001}, {3, 1'500'000, 1'500'003}}) {
    const Matrix m = Random(rows, cols, 1);
    auto buffer = cuda_->Allocate(int64_t{rows} * stride * 4);
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    const Tensor wide = buffer->View(0, DType::kFloat32, rows, stride);
    cuda_->Upload(wide.Cols(stride - cols, cols), m.values.data());
    Matrix got(rows, cols);
    cuda_->Download(got.values.data(), wide.Cols(stride - cols, cols));
    cuda_->Synchronize();
    EXPECT_TRUE(SameBits(got, m)) << rows << " x " << cols;
  }
  // What lies before a mark arrives with it, whatever has been queued since.
  const Tensor number = Device(arena_.PutInts({0}));
  std::array<int32_t, 5> seen = {};
  std::array<uint64_t, 5> marks = {};
  for (int32_t i = 0; i < 5; ++i) {
    const int32_t value = 100 + i;
    cuda_->Upload(number, &value);
    cuda_->Download(&seen[i], number);
    marks[i] = cuda_->Mark();
    if (i == 0) continue;
    cuda_->Await(marks[i - 1]);
    EXPECT_EQ(seen[i - 1], 99 + i);
  }
  cuda_->Await(marks[4]);
  EXPECT_EQ(seen[4], 104);
  // More small ones than staging memory holds.
  const Tensor small = Device(arena_.PutInts(std::vector<int32_t>(10'000)));
  for (int32_t i = 0; i < 300; ++i) cuda_->Upload(small, std::vector<int32_t>(10'000, i).data());
  EXPECT_EQ(Ints(small)[9'999], 299);
}

TEST_P(CudaBackendTest, RefusesMoreMemoryThanThereIsAndSaysHowMuch) {
  const auto buffer = cuda_->Allocate(int64_t{1} << 50);
  EXPECT_EQ(buffer.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(buffer.status().message()), HasSubstr("1125899906842624 bytes"));
}

TEST_P(CudaBackendTest, RunRecordsOnceAndReplaysWithWhatMemoryHolds) {
  const LinearWeights w = Device(Weights(Random(40, 70, 2), Layout::kInputRows, DType::kFloat16));
  const Tensor x = Put(Matrix(2, 70)), y = Put(Matrix(2, 40)), sum = Put(Matrix(2, 40));
  int calls = 0;
  for (uint32_t step = 0; step < 5; ++step) {
    const Matrix input = Random(2, 70, step);
    cuda_->Upload(x, input.values.data());
    cuda_->Upload(sum, Matrix(2, 40).values.data());
    cuda_->Run(7, [&] {
      ++calls;
      cuda_->Linear(y, x, w);
      cuda_->Add(sum, y);  // is held back beyond the last op
    });
    EXPECT_TRUE(SameBits(Got(sum), LinearOn(*cuda_, input, w))) << step;
    if (step == 2) {  // scratch grows, and recordings with it
      LinearOn(*cuda_, Random(40, 70, 3), w);
      cuda_->Run(Backend::kOnce, [&] { cuda_->Linear(y, x, w); });
    }
  }
  EXPECT_EQ(calls, 3);  // as they are, recorded, and recorded anew
}

TEST_P(CudaBackendTest, AFailureIsNamedAndNothingRunsAfterIt) {
  const Tensor x = Put(Matrix(2, 70));
  const NormWeights norm = {Put(Random(1, 70, 3)), Put(Random(1, 70, 4)), 1e-5f};
  cuda_->Synchronize();
  simt::GetEmulation().fail_next_launch = true;
  std::string first, later;
  try {
    cuda_->LayerNorm(x, x, norm);
    cuda_->Synchronize();
  } catch (const std::runtime_error& e) {
    first = e.what();
  }
  EXPECT_THAT(first, HasSubstr("Norm"));
  try {
    cuda_->Synchronize();
  } catch (const std::runtime_error& e) {
    later = e.what();
  }
  EXPECT_EQ(later, first);
}

}  // namespace
}  // namespace dejavu
