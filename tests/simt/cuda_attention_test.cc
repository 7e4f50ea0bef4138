// WriteKv and Attention of the CUDA backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
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

}  // namespace
}  // namespace dejavu
