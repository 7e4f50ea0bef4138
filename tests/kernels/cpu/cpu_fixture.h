// What the tests of the CPU backend share: a backend on each SIMD target of this machine with as many, more and fewer
// threads than CPUs, its weights, and plain double-precision versions of the MLP and of attention.
#ifndef TESTS_KERNELS_CPU_CPU_FIXTURE_H_
#define TESTS_KERNELS_CPU_CPU_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/backend.h"
#include "tests/kernels/matrix.h"

namespace dejavu {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr DType kWeightTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8};

std::unique_ptr<Backend> CreateCpu(int threads);

constexpr float kRounding = 2e-6f;
// Rounding of a sum of terms whose absolute values add up to `magnitude`.
void ExpectClose(const Matrix& got, const Matrix& want, const Matrix& magnitude);
void ExpectClose(const Matrix& got, const Matrix& want, float tolerance);

class CpuFixture : public testing::TestWithParam<std::tuple<int64_t, int>> {  // Highway target, threads
 protected:
  using Layout = LinearWeights::Layout;

  CpuFixture();
  ~CpuFixture() override;

  Matrix Linear(const Matrix& x, const LinearWeights& w, const Selection& selected = {}, int64_t group = 1) {
    return LinearOn(*backend_, x, w, selected, group);
  }
  // Outputs that are left untouched are 77.
  Matrix LinearOn(Backend& backend, const Matrix& x, const LinearWeights& w, const Selection& selected = {},
                  int64_t group = 1);

  // Weights [outputs, inputs] in `layout`, rounded to `dtype`; with a scale for int8.
  LinearWeights Weights(const Matrix& w, Layout layout, DType dtype, const Matrix& bias = {});
  static Matrix ValuesOf(const LinearWeights& w);  // [outputs, inputs]
  // W x + b, plain, and what its rounding is measured by.
  static Matrix Reference(const Matrix& x, const LinearWeights& w, Matrix* magnitude);

  Arena arena_;
  std::unique_ptr<Backend> backend_;
};

class CpuMlpFixture : public CpuFixture {
 protected:
  void Use(int64_t hidden, int64_t neurons, DType dtype);
  Matrix Mlp(const Matrix& x, const Selection& neurons = {}, bool skip_zeros = true, const Tensor& active = {});
  // Plain, over `neurons` only.
  Matrix Reference(const Matrix& x, const std::vector<int32_t>& neurons, Matrix* magnitude);
  using CpuFixture::Reference;

  MlpWeights w_;
};

// A paged cache with sequences of the given lengths, whose blocks lie scattered, filled by WriteKv.
class CpuAttentionFixture : public CpuFixture {
 protected:
  void Fill(const std::vector<int32_t>& lengths, int32_t heads, int32_t head_dim, int32_t block_tokens);
  RowTable Rows(const std::vector<int32_t>& positions, const std::vector<int32_t>& sequences) {
    return {arena_.PutInts(positions), arena_.PutInts(sequences), table_, {}};
  }
  // Rows of the step named by position and sequence. Context that is left untouched is 77.
  Matrix Attention(const std::vector<int32_t>& positions, const std::vector<int32_t>& sequences,
                   const Selection& heads = {});
  // The rows of a whole sequence.
  Matrix Whole(int32_t sequence, const Selection& heads = {});
  Matrix Reference(int32_t sequence) const;

  static constexpr float kScale = 0.7f;
  std::vector<int32_t> lengths_;
  std::vector<Matrix> qkv_;  // of every position of every sequence
  Tensor table_;
  DType kv_dtype_ = DType::kFloat32;
  KvLayer kv_;
};

std::vector<int64_t> HighwayTargetBits();

inline auto EveryTargetAndThreads() {
  return testing::Combine(testing::ValuesIn(HighwayTargetBits()), testing::Values(1, 2, 3));
}
std::string TargetAndThreads(const testing::TestParamInfo<std::tuple<int64_t, int>>& info);

}  // namespace dejavu

#endif  // TESTS_KERNELS_CPU_CPU_FIXTURE_H_
