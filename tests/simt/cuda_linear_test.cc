// Linear of the CUDA backend. On its own, too: a row's bits depend on that row alone, and what is left out without loss
// changes none of them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "tests/kernels/matrix.h"
#include "tests/simt/cuda_fixture.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

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

// So many inputs that a ring passes over them several times.
TEST_P(CudaBackendTest, ARowDependsOnItselfAloneAlsoWithManyInputs) {
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
      // x is split into halves and integers in one launch, or in one each.
      EXPECT_EQ(simt::GetEmulation().all_launches - before, dtype == DType::kInt8 ? 2 : 3);
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

// What two numbers of float16 cannot hold makes its row fail, whatever the weights' signs are: no ReLU hides it.
TEST_P(CudaBackendTest, ActivationsBeyondTwoHalvesAreNotFinite) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (const int64_t rows : {2, 40}) {
      SCOPED_TRACE(testing::Message() << Name(dtype) << ", " << rows << " rows");
      Matrix x(rows, 48, 1.0f), weights(16, 48, -1.0f);
      x.at(0, 11) = 130000.0f;
      x.at(1, 11) = 200000.0f;
      weights.at(3, 11) = 0.0f;
      const Matrix y = LinearOn(*cuda_, x, Device(Weights(weights, Layout::kOutputRows, dtype)));
      for (int64_t o = 0; o < 16; ++o) {
        const bool meets = o != 3;
        EXPECT_NEAR(y.at(0, o), meets ? -130047.0f : -47.0f, 40.0f) << o;
        if (dtype == DType::kFloat16) {
          EXPECT_TRUE(std::isnan(y.at(1, o))) << o;
        } else {
          EXPECT_NEAR(y.at(1, o), meets ? -200047.0f : -47.0f, 40.0f) << o;
        }
      }
    }
  }
}

// What the library does, from 33 rows on: halves of x side by side in one product, or in two where rows are many.
// Shapes that can be read 16 bytes at a time and others, with a bias and without.
TEST_P(CudaBackendTest, ProductsOfManyRowsAreThoseOfTheCpu) {
  struct Product {
    int64_t rows, inputs, outputs;
    bool has_bias;
  };
  for (const DType dtype : kWeightTypes) {
    const bool halves = dtype == DType::kFloat16 || dtype == DType::kBFloat16;
    for (const Layout layout : {Layout::kOutputRows, Layout::kInputRows}) {
      for (const Product& product : {Product{40, 83, 61, true},
                                     {33, 64, 40, true},
                                     {256, 16, 12, false},
                                     {257, 30, 9, true},
                                     {300, 24, 8, false}}) {
        if (!halves && product.rows > 40) continue;
        SCOPED_TRACE(testing::Message() << Name(dtype) << (layout == Layout::kOutputRows ? " output" : " input")
                                        << " rows, " << product.rows << " of x, " << product.inputs << " inputs");
        const Matrix x = Random(product.rows, product.inputs, 1);
        const LinearWeights w = Weights(Random(product.outputs, product.inputs, 2), layout, dtype,
                                        product.has_bias ? Random(1, product.outputs, 3) : Matrix(), 5);
        const int64_t gemms = simt::GetEmulation().gemms;
        const Matrix got = LinearOn(*cuda_, x, Device(w));
        EXPECT_EQ(simt::GetEmulation().gemms - gemms, !halves ? 0 : product.rows <= 256 ? 1 : 2);
        ExpectClose(got, LinearOn(*cpu_, x, w), MagnitudeOf(x, w), ToleranceOf(dtype));
      }
    }
  }
}

// Their launches do not grow with the rows.
TEST_P(CudaBackendTest, ProductsOfManyRowsAreABoundedNumberOfLaunches) {
  for (const DType dtype : {DType::kInt8, DType::kBFloat16}) {
    const LinearWeights w = Device(Weights(Random(8, 16, 2), Layout::kInputRows, dtype, Random(1, 8, 3)));
    for (const int64_t rows : {64, 600}) {
      const int64_t before = simt::GetEmulation().all_launches;
      LinearOn(*cuda_, Random(rows, 16, 1), w);
      // Of int8 at most eight sums, each of which is joined.
      EXPECT_LE(simt::GetEmulation().all_launches - before, 16) << Name(dtype) << ", " << rows << " rows";
    }
  }
}

}  // namespace
}  // namespace dejavu
