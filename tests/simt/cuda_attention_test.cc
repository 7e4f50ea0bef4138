// WriteKv and Attention of the CUDA backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/float16.h"
#include "tests/kernels/matrix.h"
#include "tests/simt/cuda_fixture.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

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
      cpu_->WriteKv(kv_, arena_.Put(qkv_[s]), {arena_.PutInts(positions), arena_.PutInts(sequences), table_, {}});
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
    return {Device(arena_.PutInts(positions)), Device(arena_.PutInts(sequences)), device_table_, {}};
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
    const RowTable rows = {arena_.PutInts(positions), arena_.PutInts(sequences), table_, {}};
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

  // softmax(q k) v of the first head in double precision, of keys and values as the cache rounds them.
  Matrix Reference(const std::vector<int32_t>& positions, const std::vector<int32_t>& sequences) {
    const int32_t head_dim = kv_.head_dim, width = kv_.heads * head_dim;
    Matrix context(static_cast<int64_t>(positions.size()), width);
    for (int64_t r = 0; r < context.rows; ++r) {
      const Matrix& qkv = qkv_[sequences[r]];
      Matrix rounded = RowsOf(qkv, 0, positions[r] + 1);
      if (kv_.dtype == DType::kFloat16) {
        for (float& value : rounded.values) value = FloatFromFloat16(Float16FromFloat(value));
      }
      std::vector<double> weights(positions[r] + 1), sums(width);
      double most = -kInfinity, total = 0;
      for (int32_t i = 0; i <= positions[r]; ++i) {
        for (int32_t d = 0; d < head_dim; ++d) {
          weights[i] += double{kScale} * qkv.at(positions[r], d) * rounded.at(i, width + d);
        }
        most = std::max(most, weights[i]);
      }
      for (int32_t i = 0; i <= positions[r]; ++i) {
        total += weights[i] = std::exp(weights[i] - most);
        for (int32_t d = 0; d < head_dim; ++d) sums[d] += weights[i] * rounded.at(i, 2 * width + d);
      }
      for (int32_t d = 0; d < head_dim; ++d) context.at(r, d) = static_cast<float>(sums[d] / total);
    }
    return context;
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

TEST_P(CudaAttentionTest, AtTheEdgesOfWarpsAndSplitsIsThatOfDoublePrecision) {
  const std::vector<int32_t> positions = {0,   1,   14,  15,  16,  17,  31,  32,  33,  47,  63,
                                          64,  65,  95,  96,  97,  111, 112, 126, 127, 128, 129,
                                          143, 144, 145, 159, 160, 255, 256, 257, 383, 384};
  const std::vector<int32_t> sequences(positions.size(), 0);
  for (const auto& [dtype, head_dim, block_tokens] : {std::tuple{DType::kFloat16, 64, 16},
                                                      {DType::kFloat16, 128, 16},
                                                      {DType::kFloat16, 256, 16},
                                                      {DType::kFloat16, 200, 24},
                                                      {DType::kFloat16, 150, 5},
                                                      {DType::kFloat32, 64, 16},
                                                      {DType::kFloat32, 128, 8},
                                                      {DType::kFloat32, 256, 16},
                                                      {DType::kFloat32, 100, 9}}) {
    SCOPED_TRACE(testing::Message() << Name(dtype) << ", head_dim " << head_dim << ", blocks of " << block_tokens);
    Fill({385}, 1, head_dim, block_tokens, dtype);
    Cache({385});
    const Matrix got = OnDevice(positions, sequences, false);
    ExpectClose(got, Reference(positions, sequences), 2e-6f);
    EXPECT_TRUE(SameBits(RowsOf(got, 20, 1), OnDevice({128}, {0}, false)));
    EXPECT_TRUE(SameBits(RowsOf(got, 31, 1), OnDevice({384}, {0}, false)));
    EXPECT_TRUE(SameBits(RowsOf(got, 16, 16),
                         OnDevice({positions.begin() + 16, positions.end()}, std::vector<int32_t>(16, 0), false)));
  }
}

TEST_P(CudaAttentionTest, DoesNotDependOnBlocksNorOnHowAPromptIsCut) {
  constexpr int32_t kFirst = 100, kRows = 64;  // over the edge of a split
  std::vector<int32_t> positions(kRows);
  std::iota(positions.begin(), positions.end(), kFirst);
  for (const DType dtype : {DType::kFloat16, DType::kFloat32}) {
    Matrix whole;
    for (const int32_t block_tokens : {16, 8, 7, 200}) {
      Fill({kFirst + kRows, 90}, 1, 24, block_tokens, dtype);
      Cache({kFirst + kRows, 0});
      const Matrix first = OnDevice({positions.begin(), positions.begin() + 32}, std::vector<int32_t>(32, 0), false);
      const Matrix second = OnDevice({positions.begin() + 32, positions.end()}, std::vector<int32_t>(32, 0), false);
      if (whole.rows == 0) {
        whole = Matrix(kRows, first.cols);
        std::copy(second.values.begin(), second.values.end(),
                  std::copy(first.values.begin(), first.values.end(), whole.values.begin()));
        ExpectClose(whole, OnCpu(positions, std::vector<int32_t>(kRows, 0)), 2e-5f);
      }
      for (const int32_t chunk : {1, 7, 16, 32}) {
        SCOPED_TRACE(testing::Message() << Name(dtype) << ", blocks of " << block_tokens << ", chunks of " << chunk);
        if (block_tokens != 16 && chunk == 1) continue;
        Fill({kFirst + kRows, 90}, 1, 24, block_tokens, dtype);
        Cache({kFirst, 89});
        const int32_t others = chunk < 32 ? 1 : 0;  // rows of another sequence
        for (int32_t start = 0; start < kRows; start += chunk) {
          const int32_t n = std::min(chunk, kRows - start);
          std::vector<int32_t> part(others, 89), sequences(others, 1);
          part.insert(part.end(), positions.begin() + start, positions.begin() + start + n);
          sequences.resize(others + n, 0);
          const Matrix got = OnDevice(part, sequences, true);
          EXPECT_EQ(launches_, 1);
          ASSERT_TRUE(SameBits(RowsOf(got, others, n), RowsOf(whole, start, n))) << "from " << start;
        }
      }
    }
  }
}

TEST_P(CudaAttentionTest, OfAPromptOfManyRowsIsThatOfTheCpu) {
  for (const DType dtype : {DType::kFloat16, DType::kFloat32}) {
    for (const int32_t block_tokens : {16, 1, 7, 200}) {
      SCOPED_TRACE(testing::Message() << Name(dtype) << ", blocks of " << block_tokens);
      Fill({40, 90}, 2, 24, block_tokens, dtype);
      Cache({0, 89});
      std::vector<int32_t> positions(41), sequences(41, 0);
      std::iota(positions.begin(), positions.end(), -1);
      positions[0] = 89;
      sequences[0] = 1;
      const Matrix got = OnDevice(positions, sequences, true);
      EXPECT_EQ(launches_, 2);
      ExpectClose(got, OnCpu(positions, sequences), 2e-5f);
    }
  }
}

TEST_P(CudaAttentionTest, WhatTheLaunchBeforeStoresIsNotReadBeforeThatHasEnded) {
  constexpr int32_t kFirst = 30, kSteps = 12;
  for (const int32_t block_tokens : {16, 5}) {
    Fill({kFirst + kSteps}, 2, 16, block_tokens, DType::kFloat16);
    Cache({kFirst});
    // Steps that nothing separates, neither another launch nor a copy.
    std::vector<Tensor> qkv, context;
    std::vector<RowTable> rows, others;
    std::vector<int32_t> positions;
    for (int32_t i = 0; i < kSteps; ++i) {
      positions.push_back(kFirst + i);
      qkv.push_back(Put(QkvOf({positions.back()}, {0})));
      context.push_back(Put(Matrix(1, qkv[0].cols / 3)));
      rows.push_back(Rows({positions.back()}, {0}));
      others.push_back(Rows({positions.back()}, {0}));
    }
    cuda_->Synchronize();
    for (int32_t i = 0; i < kSteps; ++i) {
      cuda_->WriteKv(device_kv_, qkv[i], i % 3 == 0 ? rows[i] : others[i]);  // of others: by a launch of its own
      if (i % 3 == 2) cuda_->Add(context[0], context[1]);
      cuda_->Attention(context[i], qkv[i], device_kv_, rows[i], kScale, {});
    }
    cuda_->Synchronize();
    const Matrix want = OnCpu(positions, std::vector<int32_t>(kSteps, 0));
    for (int32_t i = 1; i < kSteps; ++i) ExpectClose(Got(context[i]), RowsOf(want, i, 1), 2e-5f);
  }
}

TEST_P(CudaAttentionTest, ASelectionOfTheLaunchBeforeIsNotReadBeforeThatHasEnded) {
  constexpr int32_t kHeads = 9, kTimes = 8;
  Fill({20}, kHeads, 8, 16, DType::kFloat16);
  Cache({20});
  const Matrix want = OnCpu({19}, {0});
  const Matrix thresholds(1, kSelectorPadding);
  const SelectorWeights weights = {Device(arena_.Put(thresholds, DType::kInt8)),
                                   Device(arena_.Put(thresholds, DType::kFloat16)), Device(arena_.PutInts({1})),
                                   kHeads};
  const Tensor a = Put(Matrix(1, 1)), points = Device(arena_.PutInts({kSelectEverything})), qkv = Put(QkvOf({19}, {0}));
  const RowTable rows = Rows({19}, {0});
  std::vector<Selection> heads;
  std::vector<Tensor> counts, context;
  for (int i = 0; i < kTimes; ++i) {
    Selection none = {arena_.PutInts(std::vector<int32_t>(kHeads, 0)), arena_.PutInts({0})};
    none.masks = arena_.PutInts(std::vector<int32_t>(kSelectorPadding / 32, 0));
    heads.push_back(Device(none));
    counts.push_back(Device(arena_.PutInts({0})));
    context.push_back(Put(Matrix(1, qkv.cols / 3, 77.0f)));
  }
  cuda_->Synchronize();
  for (int i = 0; i < kTimes; ++i) {
    cuda_->Select(heads[i], counts[i], a, weights, points);
    cuda_->Attention(context[i], qkv, device_kv_, rows, kScale, heads[i]);
  }
  cuda_->Synchronize();
  for (int i = 0; i < kTimes; ++i) ExpectClose(Got(context[i]), want, 2e-5f);
}

TEST_P(CudaAttentionTest, ARowAttendsWithItsOwnHeadsAndTheOthersAreZeroOrUntouched) {
  constexpr int32_t kHeads = 9, kHeadDim = 8;
  for (const auto& [prompt, write] : {std::pair{3, false}, {3, true}, {34, true}}) {
    Fill({150, 9, 1}, kHeads, kHeadDim, 16, DType::kFloat16);
    std::vector<int32_t> positions(prompt), sequences(prompt, 0), none(prompt + 2, 0), some;
    std::iota(positions.begin(), positions.end(), 150 - prompt);
    positions.insert(positions.end(), {8, 0});
    sequences.insert(sequences.end(), {1, 2});
    Cache(write ? std::vector<int32_t>{150 - prompt, 8, 0} : std::vector<int32_t>{150, 9, 1});
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

// Stored by Attention, and by a launch of its own.
TEST_P(CudaAttentionTest, CountsTheKeysAndValuesOfARowThatAreBeyondHalfPrecision) {
  for (const DType dtype : {DType::kFloat16, DType::kFloat32}) {
    for (const bool attends : {true, false}) {
      for (const int32_t head_dim : {64, 12}) {
        Fill({130, 20}, 2, head_dim, 16, dtype);
        const std::vector<int32_t> positions = {128, 129, 19}, sequences = {0, 0, 1};
        std::vector<int32_t> want(3, 0);
        for (int i = 0; i < 3; ++i) {
          float* const row = &qkv_[sequences[i]].values[positions[i] * int64_t{6} * head_dim];
          row[3] = 1e6f;  // Q is not stored
          for (int32_t k = 0; k < 3 * i; ++k) row[2 * head_dim + k * 5] = k % 2 == 0 ? 65505.0f : -1e9f;
          row[6 * head_dim - 1] = 65504.0f;
          want[i] = dtype == DType::kFloat16 ? 3 * i : 0;
        }
        Cache({128, 19});
        RowTable rows = Rows(positions, sequences);
        rows.saturated = Device(arena_.PutInts({0, 0, 0}));
        const Tensor qkv = Put(QkvOf(positions, sequences)), context = Put(Matrix(3, 2 * head_dim, 77.0f));
        cuda_->WriteKv(device_kv_, qkv, rows);
        if (attends) cuda_->Attention(context, qkv, device_kv_, rows, kScale, {});
        std::vector<int32_t> got(3);
        cuda_->Download(got.data(), rows.saturated);
        cuda_->Synchronize();
        EXPECT_EQ(got, want) << Name(dtype) << ", attends: " << attends << ", " << head_dim;
      }
    }
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

}  // namespace
}  // namespace dejavu
