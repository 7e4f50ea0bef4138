// Every op of the CPU backend against plain double-precision loops, on every SIMD target of this machine and with as
// many, more and fewer threads than CPUs; and the promise that a row's bits depend on that row alone.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/processors.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/target.h"
#include "tests/kernels/cpu/cpu_fixture.h"
#include "tests/kernels/matrix.h"

namespace dejavu {
namespace {

using testing::HasSubstr;

class CpuBackendTest : public CpuFixture {};
INSTANTIATE_TEST_SUITE_P(Targets, CpuBackendTest, EveryTargetAndThreads(), TargetAndThreads);

TEST_P(CpuBackendTest, NamesItsTargetAndThreads) {
  const auto [target, threads] = GetParam();
  std::string name = target == HWY_AVX3 ? "avx512" : absl::AsciiStrToLower(hwy::TargetName(target));
  if (cpu::HasVnni(target)) name += "-vnni";
  EXPECT_EQ(backend_->Description(),
            "cpu, " + name + ", " + std::to_string(threads) + (threads == 1 ? " thread" : " threads"));
}

// Integers are exact: the instruction changes no bit.
TEST_P(CpuBackendTest, VnniChangesNoBit) {
  if (!cpu::HasVnni(std::get<0>(GetParam()))) GTEST_SKIP() << "this processor has no VNNI for the target";
  for (const Layout layout : {Layout::kOutputRows, Layout::kInputRows}) {
    const LinearWeights w = Weights(Random(77, 301, 2), layout, DType::kInt8);
    for (const int64_t rows : {1, 2, 3, 4, 5, 16, 17}) {
      const Matrix x = Random(rows, 301, 1);
      cpu::AllowVnni(false);
      const Matrix without = Linear(x, w);
      cpu::AllowVnni(true);
      EXPECT_TRUE(SameBits(Linear(x, w), without)) << rows << " rows";
    }
  }
}

struct Shape {
  int64_t inputs;
  int64_t outputs;
};
constexpr Shape kShapes[] = {{1, 1}, {5, 3}, {64, 96}, {301, 77}, {130, 301}, {1003, 66}};

TEST_P(CpuBackendTest, LinearIsRightAndARowDependsOnItselfAlone) {
  std::unique_ptr<Backend> one_thread = CreateCpu(1);
  for (const DType dtype : kWeightTypes) {
    for (const Layout layout : {Layout::kOutputRows, Layout::kInputRows}) {
      for (const Shape shape : kShapes) {
        SCOPED_TRACE(testing::Message() << Name(dtype) << (layout == Layout::kOutputRows ? " output" : " input")
                                        << " rows, " << shape.inputs << " -> " << shape.outputs);
        const Matrix x = Random(104, shape.inputs, 1);
        const Matrix bias = shape.inputs == 64 ? Matrix() : Random(1, shape.outputs, 3);
        const LinearWeights w = Weights(Random(shape.outputs, shape.inputs, 2), layout, dtype, bias);
        Matrix magnitude;
        const Matrix want = Reference(x, w, &magnitude);
        const Matrix all = Linear(x, w);
        ExpectClose(all, want, magnitude);
        EXPECT_TRUE(SameBits(all, LinearOn(*one_thread, x, w))) << "threads change the result";
        for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 15, 16, 17, 31, 100}) {
          const int64_t first = 104 - rows - rows % 3;
          EXPECT_TRUE(SameBits(RowsOf(all, first, rows), Linear(RowsOf(x, first, rows), w))) << rows << " rows";
        }
      }
    }
  }
}

TEST_P(CpuBackendTest, LinearKeepsToItsViews) {
  for (const Layout layout : {Layout::kOutputRows, Layout::kInputRows}) {
    for (const int64_t rows : {3, 20}) {
      const Matrix x = Random(rows, 37, 1);
      const LinearWeights packed = Weights(Random(41, 37, 2), layout, DType::kBFloat16);
      LinearWeights strided = packed;
      strided.weight = arena_.Put(Get(packed.weight), DType::kBFloat16, packed.weight.cols + 5);
      const Tensor wide_x = arena_.Put(Matrix(rows, 50, kNaN));
      const Tensor x_view = wide_x.Cols(9, 37);
      for (int64_t r = 0; r < rows; ++r) std::copy_n(&x.values[r * 37], 37, x_view.row<float>(r));
      const Tensor wide_y = arena_.Put(Matrix(rows, 45, 5.0f));
      backend_->Linear(wide_y.Cols(2, 41), x_view, strided);
      EXPECT_TRUE(SameBits(Get(wide_y.Cols(2, 41)), Linear(x, packed)));
      EXPECT_TRUE(SameBits(Get(wide_y.Cols(0, 2)), Matrix(rows, 2, 5.0f)));
      EXPECT_TRUE(SameBits(Get(wide_y.Cols(43, 2)), Matrix(rows, 2, 5.0f)));
    }
  }
}

TEST_P(CpuBackendTest, LinearOverSelectedGroupsLeavesTheOthersOut) {
  constexpr int64_t kGroups = 45;
  for (const int64_t group : {1, 7}) {
    const Matrix bias = Random(1, 75, 5);
    const LinearWeights w = Weights(Random(75, kGroups * group, 2), Layout::kInputRows, DType::kFloat16, bias);
    for (const auto& selected : {std::vector<int32_t>{}, {44}, EveryOther(1, kGroups, 3), EveryOther(0, kGroups, 1)}) {
      for (const int64_t rows : {1, 5, 17}) {
        SCOPED_TRACE(testing::Message() << selected.size() << " groups of " << group << ", rows " << rows);
        const Matrix x = Random(rows, kGroups * group, 1);
        const Matrix chosen = OnlyGroups(x, selected, group, 0.0f);
        Matrix magnitude;
        const Matrix want = Reference(chosen, w, &magnitude);
        const Matrix got = Linear(x, w, arena_.Select(selected), group);
        ExpectClose(got, want, magnitude);
        // Selected or zero: the same bits. The EXACT tier rests on this.
        EXPECT_TRUE(SameBits(got, Linear(chosen, w)));
      }
    }
  }
}

TEST_P(CpuBackendTest, LeavingOutZerosChangesNoBitEvenWhereProductsUnderflow) {
  for (const int64_t rows : {1, 5, 17}) {
    Matrix x(rows, 6);
    for (int64_t r = 0; r < rows; ++r) {
      x.at(r, 1) = 1e-30f;
      x.at(r, 4) = -1e-30f;
    }
    Matrix weights(70, 6, 1.0f);
    for (int64_t o = 0; o < 70; ++o) weights.at(o, 1) = weights.at(o, 4) = o % 2 == 0 ? -1e-30f : 1e-30f;
    for (const Matrix& bias : {Matrix(), Matrix(1, 70, 0.0f), Matrix(1, 70, -0.0f)}) {
      const LinearWeights w = Weights(weights, Layout::kInputRows, DType::kFloat32, bias);
      EXPECT_TRUE(SameBits(Linear(x, w), Linear(x, w, arena_.Select({1, 4}))));
      EXPECT_TRUE(SameBits(Linear(x, w), Linear(x, w, arena_.Select({1, 2, 4}))));
    }
  }
}

// Rows whose zeros lie elsewhere are multiplied by themselves, short lists and several rows by columns: no bit shows
// it.
TEST_P(CpuBackendTest, RowsOfFewTermsGetTheBitsOfARowAlone) {
  constexpr int64_t kInputs = 300;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32, DType::kInt8}) {
    for (const int64_t outputs : {130, 1600}) {
      Matrix x = Random(40, kInputs, 1);
      for (int64_t r = 0; r < x.rows; ++r) {
        const std::vector<int32_t> kept = Sample(kInputs, r % 5 == 4 ? 0.9 : 0.1, r);
        for (int32_t i = 0; i < kInputs; ++i) {
          if (!std::binary_search(kept.begin(), kept.end(), i)) x.at(r, i) = 0.0f;
        }
      }
      const LinearWeights w = Weights(Random(outputs, kInputs, 2), Layout::kInputRows, dtype, Random(1, outputs, 3));
      for (const double share : {0.05, 0.6, 1.0}) {
        const Selection selected = share < 1.0 ? arena_.Select(Sample(kInputs, share, 7)) : Selection{};
        Matrix alone(x.rows, outputs);
        for (int64_t r = 0; r < x.rows; ++r) {
          const Matrix row = Linear(RowsOf(x, r, 1), w, selected);
          std::copy(row.values.begin(), row.values.end(), &alone.values[r * outputs]);
        }
        for (const int64_t rows : {2, 4, 7, 16, 40}) {
          EXPECT_TRUE(SameBits(Linear(RowsOf(x, 0, rows), w, selected), RowsOf(alone, 0, rows)))
              << Name(dtype) << ", " << outputs << " columns, a list of " << share << ", " << rows << " rows";
        }
      }
    }
  }
}

TEST_P(CpuBackendTest, EveryFloat16IsWidenedExactly) {
  Tensor table = arena_.Make(DType::kFloat16, 64, 1024);
  for (int64_t i = 0; i < 65536; ++i) table.row<uint16_t>(0)[i] = static_cast<uint16_t>(i);
  std::vector<int32_t> ids(64);
  std::iota(ids.begin(), ids.end(), 0);
  const Tensor y = arena_.Put(Matrix(64, 1024));
  backend_->Embed(y, arena_.PutInts(ids), {table, {}}, 0, false);
  EXPECT_TRUE(SameBits(Get(y), Get(table)));
}

TEST_P(CpuBackendTest, NotANumberAndInfinityStayInTheirRow) {
  for (const Layout layout : {Layout::kOutputRows, Layout::kInputRows}) {
    Matrix x = Random(3, 50, 1);
    const LinearWeights w = Weights(Matrix(33, 50, 1.0f), layout, DType::kBFloat16);
    const Matrix clean = Linear(x, w);
    x.at(0, 7) = kNaN;
    x.at(2, 49) = kInfinity;
    const Matrix y = Linear(x, w);
    for (int64_t o = 0; o < 33; ++o) {
      EXPECT_TRUE(std::isnan(y.at(0, o)));
      EXPECT_EQ(y.at(1, o), clean.at(1, o));
      EXPECT_EQ(y.at(2, o), kInfinity);
    }
  }
}

class CpuMlpTest : public CpuMlpFixture {};
INSTANTIATE_TEST_SUITE_P(Targets, CpuMlpTest, EveryTargetAndThreads(), TargetAndThreads);

TEST_P(CpuMlpTest, ComputesTheSelectedNeuronsAndNoOthers) {
  for (const DType dtype : kWeightTypes) {
    Use(70, 301, dtype);
    for (const auto& selected : {std::vector<int32_t>{}, {300}, EveryOther(2, 301, 5), EveryOther(0, 301, 1)}) {
      for (const int64_t rows : {1, 3, 17}) {
        SCOPED_TRACE(testing::Message() << Name(dtype) << ", " << selected.size() << " neurons, rows " << rows);
        const Matrix x = Random(rows, 70, 1);
        Matrix magnitude;
        const Matrix want = Reference(x, selected, &magnitude);
        ExpectClose(Mlp(x, arena_.Select(selected)), want, magnitude);
      }
    }
  }
}

TEST_P(CpuMlpTest, EverythingSelectedIsTheSameAsNoSelectionAndAsTwoLinears) {
  Use(131, 600, DType::kBFloat16);
  const Matrix x = Random(20, 131, 1);
  const Matrix y = Mlp(x);
  EXPECT_TRUE(SameBits(y, Mlp(x, arena_.Select(EveryOther(0, 600, 1)))));
  Matrix hidden = Linear(x, w_.up);
  for (float& h : hidden.values) h = std::max(h, 0.0f);
  EXPECT_TRUE(SameBits(y, Linear(hidden, w_.down)));
  for (const int64_t rows : {1, 2, 7, 9}) {
    EXPECT_TRUE(SameBits(RowsOf(y, 3, rows), Mlp(RowsOf(x, 3, rows)))) << rows << " rows";
  }
}

TEST_P(CpuMlpTest, NotANumberPassesTheRelu) {
  Use(16, 40, DType::kFloat32);
  Matrix x = Random(2, 16, 1);
  x.at(1, 3) = kNaN;
  const Matrix y = Mlp(x);
  EXPECT_FALSE(std::isnan(y.at(0, 0)));
  EXPECT_TRUE(std::isnan(y.at(1, 0)));
}

class CpuAttentionTest : public CpuAttentionFixture {};
INSTANTIATE_TEST_SUITE_P(Targets, CpuAttentionTest, EveryTargetAndThreads(), TargetAndThreads);

TEST_P(CpuAttentionTest, IsRightForEveryHeadSizeAndDoesNotDependOnTheBlockSize) {
  for (const int32_t head_dim : {1, 5, 64, 80, 81, 128}) {
    Matrix first;
    for (const int32_t block_tokens : {16, 1, 3, 200}) {
      SCOPED_TRACE(testing::Message() << "head_dim " << head_dim << ", blocks of " << block_tokens);
      Fill({150, 1, 67}, 2, head_dim, block_tokens);
      const Matrix context = Whole(0);
      if (block_tokens == 16) {
        first = context;
        ExpectClose(context, Reference(0), 1e-5f);
        ExpectClose(Whole(1), Reference(1), 1e-5f);
        ExpectClose(Whole(2), Reference(2), 1e-5f);
      }
      EXPECT_TRUE(SameBits(context, first));
    }
  }
}

TEST_P(CpuAttentionTest, KeysAndValuesInHalfPrecision) {
  kv_dtype_ = DType::kFloat16;
  for (const int32_t block_tokens : {16, 5}) {
    for (const int32_t head_dim : {64, 20}) {
      Fill({140, 9}, 3, head_dim, block_tokens);
      ExpectClose(Whole(0), Reference(0), 1e-5f);
      ExpectClose(Whole(1), Reference(1), 1e-5f);
    }
  }
  // Beyond its range a value becomes its largest number; what is no number stays none.
  Fill({1}, 1, 4, 16);
  for (const auto& [value, want] : {std::pair{1e6f, 65504.0f}, {-1e6f, -65504.0f}, {kInfinity, 65504.0f}}) {
    backend_->WriteKv(kv_, arena_.Put(Matrix(1, 12, value)), Rows({0}, {0}));
    qkv_[0] = Matrix(1, 12, 0.0f);
    EXPECT_EQ(Whole(0).at(0, 0), want);
  }
  backend_->WriteKv(kv_, arena_.Put(Matrix(1, 12, kNaN)), Rows({0}, {0}));
  EXPECT_TRUE(std::isnan(Whole(0).at(0, 0)));
}

TEST_P(CpuAttentionTest, CountsTheKeysAndValuesOfARowThatAreBeyondHalfPrecision) {
  constexpr int32_t kHeads = 3, kHeadDim = 20, kWidth = kHeads * kHeadDim;
  for (const DType dtype : {DType::kFloat16, DType::kFloat32}) {
    kv_dtype_ = dtype;
    Fill({40, 40}, kHeads, kHeadDim, 16);
    Matrix qkv = Random(9, 3 * kWidth, 5);
    std::vector<int32_t> want(9, 1000);  // it adds
    const float large[] = {65505.0f, -65520.0f, 1e30f, kInfinity, -kInfinity};
    const float small[] = {65504.0f, -65504.0f, kNaN, 0.0f};
    for (int64_t r = 0; r < 9; ++r) {
      qkv.at(r, 5) = 1e6f;  // Q is not stored
      for (int64_t i = 0; i < 4 * r; ++i) {
        const int64_t column = kWidth + (i * 29 + r) % (2 * kWidth);
        qkv.at(r, column) = i % 2 == 0 ? large[i % 5] : small[i % 4];
        want[r] += i % 2 == 0 && dtype == DType::kFloat16;
      }
    }
    RowTable rows = Rows({0, 1, 2, 3, 17, 18, 5, 6, 7}, {0, 0, 0, 0, 0, 0, 1, 1, 1});
    rows.saturated = arena_.PutInts(std::vector<int32_t>(9, 1000));
    backend_->WriteKv(kv_, arena_.Put(qkv), rows);
    const int32_t* got = rows.saturated.row<int32_t>(0);
    EXPECT_EQ(std::vector<int32_t>(got, got + 9), want) << Name(dtype);
  }
}

TEST_P(CpuAttentionTest, ARowDependsOnItsSequenceAloneHoweverThePromptIsCut) {
  Fill({140, 90}, 3, 20, 16);
  const Matrix whole = Whole(0);
  const Matrix other = Whole(1);
  for (const int32_t chunk : {1, 7, 16, 33}) {
    for (int32_t first = 0; first + chunk <= 140; first += chunk * 3) {
      std::vector<int32_t> positions(chunk);
      std::iota(positions.begin(), positions.end(), first);
      std::vector<int32_t> sequences(chunk, 0);
      positions.push_back(89);
      sequences.push_back(1);
      const Matrix context = Attention(positions, sequences);
      EXPECT_TRUE(SameBits(RowsOf(context, 0, chunk), RowsOf(whole, first, chunk))) << chunk << " from " << first;
      EXPECT_TRUE(SameBits(RowsOf(context, chunk, 1), RowsOf(other, 89, 1)));
    }
  }
}

TEST_P(CpuAttentionTest, LeavesHeadsThatAreNotSelectedUntouched) {
  Fill({70}, 5, 12, 16);
  const Matrix whole = Whole(0);
  for (const auto& selected : {std::vector<int32_t>{}, {1, 4}, {0, 1, 2, 3, 4}}) {
    EXPECT_TRUE(SameBits(Whole(0, arena_.Select(selected)), OnlyGroups(whole, selected, 12, 77.0f)))
        << selected.size() << " heads";
  }
}

TEST_P(CpuAttentionTest, SurvivesScoresFarApart) {
  Fill({130}, 1, 4, 16);
  // Position 0 outweighs everything by e^400, so that later tiles add nothing; then the last position outweighs all.
  for (const int32_t loud : {0, 129}) {
    Matrix qkv(130, 12, 0.0f);
    for (int64_t r = 0; r < 130; ++r) {
      qkv.at(r, 0) = 1.0f;
      qkv.at(r, 4) = r == loud ? 400.0f / kScale : static_cast<float>(r % 3);
      qkv.at(r, 8) = static_cast<float>(r);
    }
    qkv_[0] = qkv;
    std::vector<int32_t> positions(130);
    std::iota(positions.begin(), positions.end(), 0);
    backend_->WriteKv(kv_, arena_.Put(qkv), Rows(positions, std::vector<int32_t>(130, 0)));
    EXPECT_EQ(Attention({129}, {0}).at(0, 0), static_cast<float>(loud));
  }
}

TEST_P(CpuAttentionTest, NotANumberInAKeyReachesTheRowsThatSeeIt) {
  Fill({100}, 1, 8, 16);
  static_cast<float*>(kv_.keys)[table_.row<int32_t>(0)[80 / 16] * 8 * 16 + 80 % 16] = kNaN;
  const Matrix context = Whole(0);
  EXPECT_FALSE(std::isnan(context.at(79, 0)));
  EXPECT_TRUE(std::isnan(context.at(80, 0)));
  EXPECT_TRUE(std::isnan(context.at(99, 0)));
}

TEST_P(CpuBackendTest, LayerNormIsRightAndMayWorkInPlace) {
  for (const int64_t features : {1, 3, 64, 301, 4096}) {
    Matrix x = Random(9, features, 1);
    for (float& value : x.values) value = 3.0f * value + 100.0f;  // a mean far from zero
    const Matrix weight = Random(1, features, 2);
    const Matrix bias = Random(1, features, 3);
    const NormWeights norm = {arena_.Put(weight), arena_.Put(bias), 1e-5f};
    Matrix want(9, features);
    for (int64_t r = 0; r < 9; ++r) {
      double mean = 0;
      double variance = 0;
      for (int64_t c = 0; c < features; ++c) mean += x.at(r, c);
      mean /= features;
      for (int64_t c = 0; c < features; ++c) variance += (x.at(r, c) - mean) * (x.at(r, c) - mean);
      variance /= features;
      for (int64_t c = 0; c < features; ++c) {
        want.at(r, c) =
            static_cast<float>((x.at(r, c) - mean) / std::sqrt(variance + 1e-5) * weight.at(0, c) + bias.at(0, c));
      }
    }
    const Tensor y = arena_.Put(Matrix(9, features));
    backend_->LayerNorm(y, arena_.Put(x), norm);
    ExpectClose(Get(y), want, 1e-4f);
    const Tensor in_place = arena_.Put(x);
    backend_->LayerNorm(in_place, in_place, norm);
    EXPECT_TRUE(SameBits(Get(in_place), Get(y)));
    const Tensor alone = arena_.Put(RowsOf(x, 4, 1));
    backend_->LayerNorm(alone, alone, norm);
    EXPECT_TRUE(SameBits(Get(alone), RowsOf(Get(y), 4, 1)));
  }
}

TEST_P(CpuBackendTest, EmbedAddsItsOffsetAndAccumulates) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const Tensor table = arena_.Put(Random(10, 37, 1), dtype);
    const Tensor ids = arena_.PutInts({7, 0, 3});
    const Tensor y = arena_.Put(Matrix(3, 37, 0.5f));
    backend_->Embed(y, ids, {table, {}}, 0, false);
    const Matrix values = Get(table);
    Matrix want(3, 37);
    for (int64_t c = 0; c < 37; ++c) {
      want.at(0, c) = values.at(7, c);
      want.at(1, c) = values.at(0, c);
      want.at(2, c) = values.at(3, c);
    }
    EXPECT_TRUE(SameBits(Get(y), want));
    backend_->Embed(y, ids, {table, {}}, 2, true);
    for (int64_t c = 0; c < 37; ++c) {
      want.at(0, c) += values.at(9, c);
      want.at(1, c) += values.at(2, c);
      want.at(2, c) += values.at(5, c);
    }
    EXPECT_TRUE(SameBits(Get(y), want));
    // The second and the first of what was drawn, and an id of its own; what was drawn may be none.
    backend_->Embed(y, arena_.PutInts({-2, -1, 3}), {table, {}}, 0, false, arena_.PutInts({6, -1, 4}));
    for (int64_t c = 0; c < 37; ++c) {
      want.at(0, c) = 0.0f;
      want.at(1, c) = values.at(6, c);
      want.at(2, c) = values.at(3, c);
    }
    EXPECT_TRUE(SameBits(Get(y), want));
  }
}

TEST_P(CpuBackendTest, AddAndGatherRowsTouchWhatTheyShould) {
  Matrix x = Random(500, 71, 1);
  const Matrix y = Random(500, 71, 2);
  const Tensor sum = arena_.Put(x);
  backend_->Add(sum, arena_.Put(y));
  for (size_t i = 0; i < x.values.size(); ++i) x.values[i] += y.values[i];
  EXPECT_TRUE(SameBits(Get(sum), x));

  const Tensor gathered = arena_.Put(Matrix(3, 71));
  backend_->GatherRows(gathered, arena_.Put(y), arena_.PutInts({499, 2, 2}));
  for (int64_t c = 0; c < 71; ++c) {
    EXPECT_EQ(Get(gathered).at(0, c), y.at(499, c));
    EXPECT_EQ(Get(gathered).at(2, c), y.at(2, c));
  }
}

TEST(CpuBackend, UploadsToAndDownloadsFromStridedViews) {
  std::unique_ptr<Backend> backend = CreateCpu(2);
  Arena arena;
  const Tensor wide = arena.Put(Matrix(3, 8, 9.0f));
  const Matrix m = Random(3, 5, 1);
  backend->Upload(wide.Cols(2, 5), m.values.data());
  EXPECT_TRUE(SameBits(Get(wide.Cols(2, 5)), m));
  EXPECT_TRUE(SameBits(Get(wide.Cols(7, 1)), Matrix(3, 1, 9.0f)));
  Matrix back(3, 5);
  backend->Download(back.values.data(), wide.Cols(2, 5));
  backend->Synchronize();
  EXPECT_TRUE(SameBits(back, m));
}

TEST(CpuBackend, AllocatesZeroedAlignedMemoryOfAnySize) {
  std::unique_ptr<Backend> backend = CreateCpu(1);
  for (const int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{1000}, int64_t{2} << 20, (int64_t{5} << 20) + 3}) {
    absl::StatusOr<Buffer> buffer = backend->Allocate(bytes);
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    EXPECT_EQ(buffer->bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % (bytes >= 2 << 20 ? 2 << 20 : 64), 0u);
    const char* data = static_cast<const char*>(buffer->data());
    EXPECT_TRUE(std::all_of(data, data + bytes, [](char c) { return c == 0; })) << bytes;
    std::memset(buffer->data(), 1, bytes);
  }
}

TEST(CpuBackend, RefusesMoreMemoryThanThereIsAndSaysHowMuch) {
  const auto buffer = CreateCpu(1)->Allocate(int64_t{1} << 60);
  EXPECT_EQ(buffer.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(buffer.status().message()), HasSubstr("1152921504606846976 bytes"));
}

TEST(CpuBackend, RefusesANegativeNumberOfThreads) {
  EXPECT_EQ(CreateCpuBackend({.threads = -1}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(CpuBackend, ZeroThreadsMeansOnePerCpu) {
  EXPECT_THAT(CreateCpu(0)->Description(), HasSubstr(absl::StrCat(", ", DefaultThreads().count, " thread")));
}

}  // namespace
}  // namespace dejavu
