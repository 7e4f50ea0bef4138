#include "tests/kernels/cpu/cpu_fixture.h"
#include "kernels/cpu/cpu_backend.h"

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace dejavu {
namespace {

void ForceTarget(int64_t target) {  // 0: the best again
  hwy::SetSupportedTargetsForTest(target);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace

std::vector<int64_t> HighwayTargetBits() {
  std::vector<int64_t> targets;
  for (int64_t left = (hwy::SupportedTargets() | HWY_STATIC_TARGET) & HWY_TARGETS; left != 0; left &= left - 1) {
    targets.push_back(left & -left);
  }
  return targets;
}

std::string TargetAndThreads(const testing::TestParamInfo<std::tuple<int64_t, int>>& info) {
  return std::string(hwy::TargetName(std::get<0>(info.param))) + "_threads" + std::to_string(std::get<1>(info.param));
}

std::unique_ptr<Backend> CreateCpu(int threads) {
  auto backend = CreateCpuBackend({.threads = threads, .pin = false});
  EXPECT_TRUE(backend.ok()) << backend.status();
  return *std::move(backend);
}

void ExpectClose(const Matrix& got, const Matrix& want, const Matrix& magnitude) {
  ASSERT_EQ(got.rows, want.rows);
  ASSERT_EQ(got.cols, want.cols);
  for (int64_t r = 0; r < got.rows; ++r) {
    for (int64_t c = 0; c < got.cols; ++c) {
      ASSERT_NEAR(got.at(r, c), want.at(r, c), kRounding * magnitude.at(r, c)) << "row " << r << ", column " << c;
    }
  }
}

void ExpectClose(const Matrix& got, const Matrix& want, float tolerance) {
  ExpectClose(got, want, Matrix(want.rows, want.cols, tolerance / kRounding));
}

CpuFixture::CpuFixture() {
  ForceTarget(std::get<0>(GetParam()));
  backend_ = CreateCpu(std::get<1>(GetParam()));
}

CpuFixture::~CpuFixture() { ForceTarget(0); }

Matrix CpuFixture::LinearOn(Backend& backend, const Matrix& x, const LinearWeights& w, const Selection& selected,
                            int64_t group) {
  const Tensor y = arena_.Put(Matrix(x.rows, w.outputs(), 77.0f));
  backend.Linear(y, arena_.Put(x), w, selected, group);
  return Get(y);
}

LinearWeights CpuFixture::Weights(const Matrix& w, Layout layout, DType dtype, const Matrix& bias) {
  return arena_.Weights(w, layout, dtype, bias);
}

Matrix CpuFixture::ValuesOf(const LinearWeights& w) {
  Matrix values = w.layout == Layout::kOutputRows ? Get(w.weight) : Transposed(Get(w.weight));
  if (w.scale.empty()) return values;
  for (int64_t o = 0; o < values.rows; ++o) {
    for (int64_t i = 0; i < values.cols; ++i) {
      values.at(o, i) *= w.scale.row<float>(0)[w.layout == Layout::kOutputRows ? o : i];
    }
  }
  return values;
}

Matrix CpuFixture::Reference(const Matrix& x, const LinearWeights& w, Matrix* magnitude) {
  constexpr float kSteps = 8192.0f;  // of an activation, from zero to the largest of its row, at least
  const Matrix values = ValuesOf(w);
  Matrix y = ReferenceLinear(x, values, w.bias.empty() ? Matrix() : Get(w.bias), magnitude);
  if (w.scale.empty()) return y;
  // With int8 weights activations are rounded to integers, after the factor of their input where it has one.
  const auto factor = [&](int64_t i) { return w.layout == Layout::kOutputRows ? 1.0f : w.scale.row<float>(0)[i]; };
  for (int64_t r = 0; r < x.rows; ++r) {
    float largest = 0.0f;
    for (int64_t i = 0; i < x.cols; ++i) largest = std::max(largest, std::abs(x.at(r, i) * factor(i)));
    for (int64_t o = 0; o < y.cols; ++o) {
      for (int64_t i = 0; i < x.cols; ++i) {
        if (factor(i) == 0.0f) continue;
        magnitude->at(r, o) += std::abs(values.at(o, i) / factor(i)) * largest / kSteps * 0.51f / kRounding;
      }
    }
  }
  return y;
}

void CpuMlpFixture::Use(int64_t hidden, int64_t neurons, DType dtype) {
  w_.up = Weights(Random(neurons, hidden, 11), Layout::kOutputRows, dtype, Random(1, neurons, 12));
  w_.down = Weights(Random(hidden, neurons, 13), Layout::kInputRows, dtype, Random(1, hidden, 14));
}

Matrix CpuMlpFixture::Mlp(const Matrix& x, const Selection& neurons, bool skip_zeros, const Tensor& active) {
  const Tensor y = arena_.Put(Matrix(x.rows, x.cols, 77.0f));
  const Tensor hidden = arena_.Put(Matrix(x.rows, w_.up.outputs(), kNaN));
  backend_->Mlp(y, arena_.Put(x), w_, neurons, skip_zeros, hidden, active);
  return Get(y);
}

Matrix CpuMlpFixture::Reference(const Matrix& x, const std::vector<int32_t>& neurons, Matrix* magnitude) {
  Matrix of_hidden;
  const Matrix hidden = Reference(x, w_.up, &of_hidden);
  Matrix active(hidden.rows, hidden.cols);
  for (int64_t r = 0; r < hidden.rows; ++r) {
    for (const int32_t n : neurons) active.at(r, n) = std::max(0.0f, hidden.at(r, n));
  }
  Matrix y = Reference(active, w_.down, magnitude);
  const Matrix down = ValuesOf(w_.down);
  for (int64_t r = 0; r < y.rows; ++r) {
    for (int64_t o = 0; o < y.cols; ++o) {
      for (const int32_t n : neurons) magnitude->at(r, o) += std::abs(down.at(o, n)) * of_hidden.at(r, n);
    }
  }
  return y;
}

void CpuAttentionFixture::Fill(const std::vector<int32_t>& lengths, int32_t heads, int32_t head_dim,
                               int32_t block_tokens) {
  lengths_ = lengths;
  const int32_t longest = *std::max_element(lengths.begin(), lengths.end());
  const int32_t per_sequence = (longest + block_tokens - 1) / block_tokens;
  const int32_t blocks = per_sequence * static_cast<int32_t>(lengths.size());
  table_ = arena_.Make(DType::kInt32, static_cast<int64_t>(lengths.size()), per_sequence);
  for (int32_t i = 0; i < blocks; ++i) table_.row<int32_t>(0)[i] = blocks - 1 - i;
  kv_ = {nullptr, nullptr, blocks, heads, block_tokens, head_dim, kv_dtype_};
  // What was never written must never be read.
  kv_.keys = arena_.Put(Matrix(blocks * heads, block_tokens * head_dim, kNaN), kv_dtype_).data;
  kv_.values = arena_.Put(Matrix(blocks * heads, block_tokens * head_dim, kNaN), kv_dtype_).data;
  qkv_.clear();
  for (size_t s = 0; s < lengths.size(); ++s) {
    qkv_.push_back(Random(lengths[s], 3 * heads * head_dim, 20 + static_cast<uint32_t>(s)));
    if (kv_dtype_ == DType::kFloat16) qkv_[s] = Get(arena_.Put(qkv_[s], kv_dtype_));  // what is exact there
    std::vector<int32_t> positions(lengths[s]);
    std::iota(positions.begin(), positions.end(), 0);
    backend_->WriteKv(kv_, arena_.Put(qkv_[s]),
                      Rows(positions, std::vector<int32_t>(positions.size(), static_cast<int32_t>(s))));
  }
}

Matrix CpuAttentionFixture::Attention(const std::vector<int32_t>& positions, const std::vector<int32_t>& sequences,
                                      const Selection& heads) {
  Matrix qkv(static_cast<int64_t>(positions.size()), qkv_[0].cols);
  for (size_t r = 0; r < positions.size(); ++r) {
    std::copy_n(&qkv_[sequences[r]].values[positions[r] * qkv.cols], qkv.cols, &qkv.values[r * qkv.cols]);
  }
  const Tensor context = arena_.Put(Matrix(qkv.rows, qkv.cols / 3, 77.0f));
  backend_->Attention(context, arena_.Put(qkv), kv_, Rows(positions, sequences), kScale, heads);
  return Get(context);
}

Matrix CpuAttentionFixture::Whole(int32_t sequence, const Selection& heads) {
  std::vector<int32_t> positions(lengths_[sequence]);
  std::iota(positions.begin(), positions.end(), 0);
  return Attention(positions, std::vector<int32_t>(positions.size(), sequence), heads);
}

Matrix CpuAttentionFixture::Reference(int32_t sequence) const {
  const Matrix& qkv = qkv_[sequence];
  const int64_t width = qkv.cols / 3;
  Matrix context(qkv.rows, width);
  for (int64_t r = 0; r < qkv.rows; ++r) {
    for (int64_t head = 0; head < kv_.heads; ++head) {
      const int64_t column = head * kv_.head_dim;
      std::vector<double> weights;
      double total = 0;
      for (int64_t p = 0; p <= r; ++p) {
        double score = 0;
        for (int64_t d = column; d < column + kv_.head_dim; ++d) {
          score += static_cast<double>(qkv.at(r, d)) * qkv.at(p, width + d);
        }
        weights.push_back(std::exp(score * kScale));
        total += weights.back();
      }
      for (int64_t d = column; d < column + kv_.head_dim; ++d) {
        double sum = 0;
        for (int64_t p = 0; p <= r; ++p) sum += weights[p] / total * qkv.at(p, 2 * width + d);
        context.at(r, d) = static_cast<float>(sum);
      }
    }
  }
  return context;
}

}  // namespace dejavu
