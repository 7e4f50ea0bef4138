// What stands between two products of the CUDA backend: the end of a Sum, Add, LayerNorm and the fragments of the next
// product share launches, and give bit by bit what each gives alone.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "kernels/cuda/params.h"
#include "tests/kernels/matrix.h"
#include "tests/simt/cuda_fixture.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

constexpr int64_t kFeatures = 300, kInputs = 200, kOutputs = 70;

// x += down(context), h = norm(x), y = up(h).
struct Chain {
  Tensor context, partial, x, h, y;
};

class CudaNormTest : public CudaBackendTest {
 protected:
  CudaNormTest() : norm_{Put(Random(1, kFeatures, 3)), Put(Random(1, kFeatures, 4)), 1e-5f} {}

  void Use(DType dtype) {
    down_ = Device(Weights(Random(kFeatures, kInputs, 5), Layout::kInputRows, dtype, Random(1, kFeatures, 6)));
    up_ = Device(Weights(Random(kOutputs, kFeatures, 7), Layout::kOutputRows, dtype, Random(1, kOutputs, 8)));
  }
  Chain Rows(int64_t first, int64_t rows) {
    const Matrix context = RowsOf(Random(16, kInputs, 1), first, rows),
                 x = RowsOf(Random(16, kFeatures, 2), first, rows);
    return {Put(context), Put(Matrix(rows, kFeatures, 77.0f)), Put(x), Put(Matrix(rows, kFeatures, 77.0f)),
            Put(Matrix(rows, kOutputs, 77.0f))};
  }
  // `apart`: nothing is held back over the border of an op.
  void Run(const Chain& c, bool apart) {
    const auto end = [&] {
      if (apart) cuda_->Synchronize();
    };
    cuda_->Linear(c.partial, c.context, down_);
    end();
    cuda_->Add(c.x, c.partial);
    end();
    cuda_->LayerNorm(c.h, c.x, norm_);
    end();
    cuda_->Linear(c.y, c.h, up_);
    cuda_->Synchronize();
  }
  void ExpectSame(const Chain& a, const Chain& b) {
    EXPECT_TRUE(SameBits(Got(a.partial), Got(b.partial)));
    EXPECT_TRUE(SameBits(Got(a.x), Got(b.x)));
    EXPECT_TRUE(SameBits(Got(a.h), Got(b.h)));
    EXPECT_TRUE(SameBits(Got(a.y), Got(b.y)));
  }

  NormWeights norm_;
  LinearWeights down_, up_;
};
INSTANTIATE_TEST_SUITE_P(Orders, CudaNormTest, testing::Values(0, 1, 2),
                         [](const auto& info) { return "Order" + std::to_string(info.param); });

TEST_P(CudaNormTest, WhatIsDoneInOneLaunchIsWhatIsDoneInSeveral) {
  for (const DType dtype : kWeightTypes) {
    Use(dtype);
    const Chain all = Rows(0, 16);
    Run(all, /*apart=*/true);
    for (const int64_t rows : {1, 3, 4, 9, 16}) {
      SCOPED_TRACE(testing::Message() << Name(dtype) << ", rows " << rows);
      const Chain apart = Rows(16 - rows, rows), together = Rows(16 - rows, rows);
      Run(apart, /*apart=*/true);
      simt::GetEmulation().ResetCounts();
      Run(together, /*apart=*/false);
      // The sum's last block does the norm, or the norm joins the sum's segments.
      EXPECT_EQ(simt::GetEmulation().all_launches, rows <= 3 ? 2 : 3);
      EXPECT_EQ(Launches(cuda::kNorm), rows <= 3 ? 0 : 1);
      EXPECT_EQ(Launches(cuda::kJoinSums), 0);
      ExpectSame(together, apart);
      EXPECT_TRUE(SameBits(Got(together.y), RowsOf(Got(all.y), 16 - rows, rows)));
    }
  }
}

// What has been split is used again as long as it is that of the same rows, unchanged.
TEST_P(CudaNormTest, FragmentsAreThoseOfTheRowsAsTheyAre) {
  Use(DType::kBFloat16);
  const LinearWeights small = Device(Weights(Random(35, kFeatures, 9), Layout::kOutputRows, DType::kInt8));
  const Tensor x = Put(Random(2, kFeatures, 10)), y = Put(Matrix(2, kOutputs)), along = Put(Matrix(2, 35));
  const auto launches = [&](const auto& op) {
    simt::GetEmulation().ResetCounts();
    op();
    cuda_->Synchronize();
    return simt::GetEmulation().all_launches;
  };
  EXPECT_EQ(launches([&] { cuda_->Linear(y, x, up_); }), 2);
  EXPECT_EQ(launches([&] { cuda_->Linear(y, x, up_); }), 1);
  EXPECT_EQ(launches([&] { cuda_->Linear(along, x, small); }), 2);
  EXPECT_EQ(launches([&] { cuda_->Linear(y, x, up_, {}, 1, {along, &small}); }), 1);
  EXPECT_EQ(launches([&] { cuda_->Linear(y.Rows(0, 1), x.Rows(0, 1), up_); }), 2);
  EXPECT_EQ(launches([&] { cuda_->Linear(y, x, up_); }), 2);
  const Matrix before = Got(y);
  cuda_->Add(x, Put(Random(2, kFeatures, 11)));
  EXPECT_EQ(launches([&] { cuda_->Linear(y, x, up_); }), 3);  // Add as well
  EXPECT_FALSE(SameBits(Got(y), before));
  EXPECT_TRUE(SameBits(Got(y), LinearOn(*cuda_, Got(x), up_)));
  const Matrix other = Random(2, kFeatures, 12);
  cuda_->Upload(x, other.values.data());
  cuda_->Linear(y, x, up_);
  EXPECT_TRUE(SameBits(Got(y), LinearOn(*cuda_, other, up_)));
}

}  // namespace
}  // namespace dejavu
