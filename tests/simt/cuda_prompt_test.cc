// Attention of the CUDA backend in steps of more than 32 rows, beside sums in double precision.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/float16.h"
#include "tests/kernels/matrix.h"
#include "tests/simt/cuda_fixture.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

// Rows of a step: positions `first` ... of a sequence.
struct Chunk {
  int32_t sequence, first, rows;
};
using Step = std::vector<Chunk>;

int32_t RowsIn(const Step& step) {
  int32_t rows = 0;
  for (const Chunk& chunk : step) rows += chunk.rows;
  return rows;
}

class CudaPromptTest : public CudaBackendTest {
 protected:
  // Sequences of that length in a cache of float16 whose blocks lie scattered; what was never written is NaN.
  void Fill(int32_t sequences, int32_t length, int32_t heads, int32_t head_dim, int32_t block_tokens = 16) {
    heads_ = heads;
    head_dim_ = head_dim;
    qkv_.clear();
    for (int32_t s = 0; s < sequences; ++s) qkv_.push_back(Random(length, 3 * heads * head_dim, 20 + s));
    const int32_t per_sequence = (length + block_tokens - 1) / block_tokens, blocks = sequences * per_sequence;
    std::vector<int32_t> table(blocks);
    for (int32_t i = 0; i < blocks; ++i) table[i] = blocks - 1 - i;
    table_ = Device(arena_.PutInts(table));
    table_.rows = sequences;
    table_.cols = table_.stride = per_sequence;
    const Tensor empty =
        arena_.Put(Matrix(int64_t{blocks} * heads, int64_t{block_tokens} * head_dim, kNaN), DType::kFloat16);
    keys_ = Device(empty);
    values_ = Device(empty);
    kv_ = {keys_.data, values_.data, blocks, heads, block_tokens, head_dim, DType::kFloat16};
  }

  RowTable RowsOfStep(const Step& step) {
    std::vector<int32_t> positions, sequences;
    for (const Chunk& chunk : step) {
      for (int32_t i = 0; i < chunk.rows; ++i) {
        positions.push_back(chunk.first + i);
        sequences.push_back(chunk.sequence);
      }
    }
    return {Device(arena_.PutInts(positions)), Device(arena_.PutInts(sequences)), table_, {}};
  }
  Matrix QkvOf(const Step& step) const {
    Matrix qkv(0, qkv_[0].cols);
    for (const Chunk& chunk : step) {
      const Matrix rows = RowsOf(qkv_[chunk.sequence], chunk.first, chunk.rows);
      qkv.values.insert(qkv.values.end(), rows.values.begin(), rows.values.end());
      qkv.rows += chunk.rows;
    }
    return qkv;
  }
  void Write(const Step& step) { cuda_->WriteKv(kv_, Put(QkvOf(step)), RowsOfStep(step)); }
  // In small steps, which other kernels do.
  void WriteBefore(const Chunk& chunk) {
    for (int32_t first = 0; first < chunk.first; first += 16) {
      Write({{chunk.sequence, first, std::min(16, chunk.first - first)}});
    }
  }
  // What was never touched is 77.
  Matrix OnDevice(const Step& step, const Selection& heads = {}) {
    const Tensor qkv = Put(QkvOf(step)), context = Put(Matrix(qkv.rows, qkv.cols / 3, 77.0f));
    const RowTable rows = RowsOfStep(step);
    const Selection on_device = Device(heads);
    cuda_->Synchronize();
    const int64_t before = simt::GetEmulation().all_launches;
    cuda_->WriteKv(kv_, qkv, rows);
    cuda_->Attention(context, qkv, kv_, rows, kScale, on_device);
    cuda_->Synchronize();
    launches_ = simt::GetEmulation().all_launches - before;
    return Got(context);
  }

  static float Rounded(float value) { return FloatFromFloat16(Float16FromFloat(value)); }
  // Of a head of the row at `position`.
  std::vector<double> InDoubles(int32_t sequence, int32_t position, int32_t head) const {
    const Matrix& qkv = qkv_[sequence];
    const int32_t width = heads_ * head_dim_, column = head * head_dim_;
    std::vector<double> weights(position + 1), context(head_dim_);
    double total = 0.0;
    for (int32_t i = 0; i <= position; ++i) {
      double score = 0.0;
      for (int32_t d = column; d < column + head_dim_; ++d) {
        score += double{qkv.at(position, d)} * Rounded(qkv.at(i, width + d));
      }
      total += weights[i] = std::exp(kScale * score);
    }
    for (int32_t i = 0; i <= position; ++i) {
      for (int32_t d = 0; d < head_dim_; ++d) {
        context[d] += weights[i] / total * Rounded(qkv.at(i, 2 * width + column + d));
      }
    }
    return context;
  }
  // The largest error of a head's context, as a share of its norm.
  double ErrorOf(const Matrix& got, const Step& step) const {
    double worst = 0.0;
    int64_t row = 0;
    for (const Chunk& chunk : step) {
      for (int32_t i = 0; i < chunk.rows; ++i, ++row) {
        for (int32_t head = 0; head < heads_; ++head) {
          const std::vector<double> want = InDoubles(chunk.sequence, chunk.first + i, head);
          double error = 0.0, norm = 0.0;
          for (int32_t d = 0; d < head_dim_; ++d) {
            const double difference = got.at(row, head * head_dim_ + d) - want[d];
            error += difference * difference;
            norm += want[d] * want[d];
          }
          worst = std::max(worst, error > 0.0 ? std::sqrt(error / norm) : std::isnan(error) ? 1e9 : 0.0);
        }
      }
    }
    return worst;
  }

  static constexpr float kScale = 0.5f;
  static constexpr double kMostError = 5e-4;  // of weights that are rounded to 11 bits
  int32_t heads_ = 0, head_dim_ = 0;
  std::vector<Matrix> qkv_;
  Tensor table_, keys_, values_;
  KvLayer kv_;
  int64_t launches_ = 0;
};
INSTANTIATE_TEST_SUITE_P(Orders, CudaPromptTest, testing::Values(0, 1, 2),
                         [](const auto& info) { return absl::StrCat("Order", info.param); });

// Chunks that begin and end within blocks and pieces, several sequences, decoding rows before them and between.
const Step kSteps[] = {
    {{0, 0, 33}},
    {{0, 0, 130}},
    {{0, 50, 64}, {1, 3, 16}},
    {{1, 140, 1}, {2, 0, 1}, {0, 63, 1}, {3, 60, 70}},
    {{0, 128, 1}, {1, 0, 17}, {2, 127, 2}, {3, 0, 15}},
    {{0, 7, 20}, {1, 141, 1}, {2, 64, 64}, {3, 0, 1}},
};

TEST_P(CudaPromptTest, IsWithinRoundingOfDoubles) {
  for (const int32_t head_dim : {64, 80, 128}) {
    for (const Step& step : kSteps) {
      Fill(4, 142, 1, head_dim, head_dim == 80 ? 24 : 16);
      for (const Chunk& chunk : step) WriteBefore(chunk);
      const Matrix got = OnDevice(step);
      EXPECT_EQ(launches_, 2);
      EXPECT_LT(ErrorOf(got, step), kMostError) << head_dim << ", " << RowsIn(step) << " rows";
    }
  }
  EXPECT_GT(Launches(cuda::kPromptAttention64), 0);
  EXPECT_GT(Launches(cuda::kPromptAttention128), 0);
  EXPECT_EQ(Launches(cuda::kAttentionF16), 0);
}

TEST_P(CudaPromptTest, OfTheNarrowestAndTheWidestHeads) {
  for (const int32_t head_dim : {32, 96, 144, 256}) {
    const Step step = {{0, 30, 40}, {1, 5, 1}};
    Fill(2, 70, 2, head_dim, 8);
    for (const Chunk& chunk : step) WriteBefore(chunk);
    EXPECT_LT(ErrorOf(OnDevice(step), step), kMostError) << head_dim;
  }
  EXPECT_GT(Launches(cuda::kPromptAttention256), 0);
}

// More rows of sequences with few than there are blocks for at once.
TEST_P(CudaPromptTest, OfManyDecodingRows) {
  Step step;
  for (int32_t s = 0; s < 40; ++s) step.push_back({s, 3 * s % 70, 1});
  Fill(40, 70, 2, 64);
  for (const Chunk& chunk : step) WriteBefore(chunk);
  EXPECT_LT(ErrorOf(OnDevice(step), step), kMostError);
}

TEST_P(CudaPromptTest, ARowsBitsDependNeitherOnItsCompanyNorOnHowAPromptIsCut) {
  Fill(5, 200, 1, 64);
  const Matrix whole = OnDevice({{0, 0, 200}});
  Fill(5, 200, 1, 64, 8);
  WriteBefore({1, 100, 1});
  WriteBefore({4, 150, 1});
  int32_t at = 0;
  for (const int32_t rows : {33, 40, 64, 63}) {
    const Step step = {{1, 100, 1}, {4, 150, 2}, {0, at, rows}, {2, 0, 5}};
    const Matrix got = OnDevice(step);
    EXPECT_TRUE(SameBits(RowsOf(got, 3, rows), RowsOf(whole, at, rows))) << rows << " from " << at;
    at += rows;
  }
}

TEST_P(CudaPromptTest, StoresWhatSmallStepsStore) {
  for (const int32_t head_dim : {64, 80}) {
    for (const Step& step : kSteps) {
      Fill(4, 142, 2, head_dim, 24);
      Write(step);
      const Matrix keys = Got(keys_), values = Got(values_);
      const int64_t large = Launches(cuda::kWritePromptKv);
      Fill(4, 142, 2, head_dim, 24);
      for (const Chunk& chunk : step) {
        for (int32_t i = 0; i < chunk.rows; ++i) Write({{chunk.sequence, chunk.first + i, 1}});
      }
      EXPECT_TRUE(SameBits(Got(keys_), keys)) << RowsIn(step) << " rows";
      EXPECT_TRUE(SameBits(Got(values_), values)) << RowsIn(step) << " rows";
      EXPECT_EQ(Launches(cuda::kWritePromptKv), large);
    }
  }
  EXPECT_GT(Launches(cuda::kWritePromptKv), 0);
}

TEST_P(CudaPromptTest, ARowAttendsWithItsOwnHeadsAndTheOthersAreZeroOrUntouched) {
  constexpr int32_t kHeads = 5;
  const Step step = {{1, 8, 1}, {2, 0, 1}, {0, 3, 36}};
  Fill(3, 40, kHeads, 32);
  for (const Chunk& chunk : step) WriteBefore(chunk);
  const Matrix all = OnDevice(step);
  const int32_t rows = RowsIn(step);
  const Lists of_rows = {{0}, {4}, {}, {0, 1}};  // nobody: 2, 3
  Lists lists;
  std::vector<int32_t> some;
  for (int32_t r = 0; r < rows; ++r) {
    lists.push_back(of_rows[r % 4]);
    some.push_back(r % 3 != 1);
  }
  const Selection none = arena_.SelectRows(Lists(rows), kHeads);
  EXPECT_TRUE(SameBits(OnDevice(step, none), Matrix(rows, all.cols, 77.0f)));
  for (const auto& strict : {std::vector<int32_t>{}, std::vector<int32_t>(rows, 0), some}) {
    const Matrix got = OnDevice(step, arena_.SelectRows(lists, kHeads, strict));
    for (int32_t r = 0; r < rows; ++r) {
      for (int32_t head = 0; head < kHeads; ++head) {
        const bool anybody = head != 2 && head != 3;
        const bool own = (!strict.empty() && strict[r] == 0) || testing::Value(lists[r], testing::Contains(head));
        for (int32_t d = head * 32; d < head * 32 + 32; ++d) {
          ASSERT_EQ(got.at(r, d), !anybody ? 77.0f : own ? all.at(r, d) : 0.0f) << "row " << r << ", head " << head;
        }
      }
    }
  }
  const Matrix listed = OnDevice(step, arena_.Select({1, 3}));
  EXPECT_TRUE(SameBits(listed, OnlyGroups(all, {1, 3}, 32, 77.0f)));
}

TEST_P(CudaPromptTest, NumbersBeyondHalfPrecisionKeepTheirOrder) {
  Fill(1, 34, 1, 32);
  for (int32_t d = 0; d < 32; ++d) {
    qkv_[0].at(33, d) = d == 0 ? 1e5f : 0.0f;  // Q of the last row, beyond float16
    for (int32_t i = 0; i < 34; ++i) qkv_[0].at(i, 32 + d) = d == 0 && i == 20 ? 1.0f : 0.0f;
    qkv_[0].at(20, 64 + d) = d == 0 ? 1e6f : -kInfinity;
  }
  const Matrix got = OnDevice({{0, 0, 34}});
  EXPECT_EQ(got.at(33, 0), 65504.0f);
  EXPECT_EQ(got.at(33, 1), -65504.0f);
}

// Rows that store 8 positions of a feature at once, and others.
TEST_P(CudaPromptTest, CountsTheKeysAndValuesOfARowThatAreBeyondHalfPrecision) {
  Fill(1, 60, 2, 32);
  const Step step = {{0, 3, 50}};
  WriteBefore(step[0]);
  std::vector<int32_t> want(50, 0);
  for (int32_t r = 0; r < 50; ++r) {
    qkv_[0].at(3 + r, 1) = 1e6f;  // Q is not stored
    for (int32_t k = 0; k < r % 4; ++k) qkv_[0].at(3 + r, 64 + (k * 37 + r) % 128) = k % 2 == 0 ? 65505.0f : -1e9f;
    want[r] = r % 4;
  }
  RowTable rows = RowsOfStep(step);
  rows.saturated = Device(arena_.PutInts(std::vector<int32_t>(50, 0)));
  cuda_->WriteKv(kv_, Put(QkvOf(step)), rows);
  std::vector<int32_t> got(50);
  cuda_->Download(got.data(), rows.saturated);
  cuda_->Synchronize();
  EXPECT_EQ(got, want);
}

TEST_P(CudaPromptTest, NotANumberInAKeyReachesTheRowsThatSeeIt) {
  Fill(1, 100, 1, 32);
  qkv_[0].at(80, 32) = kNaN;
  const Matrix got = OnDevice({{0, 0, 100}});
  for (int64_t r = 0; r < 100; ++r) EXPECT_EQ(std::isnan(got.at(r, 0)), r >= 80) << r;
}

}  // namespace
}  // namespace dejavu
