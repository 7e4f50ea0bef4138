// The ops of the CUDA backend that move rows, its memory, recordings and failures.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "tests/kernels/matrix.h"
#include "tests/simt/cuda_fixture.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

using testing::HasSubstr;

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
      // The last two lie outside the table; beside what was drawn, they are the last two there, one of them outside.
      const Tensor ids = arena_.PutInts({7, 0, -3, 8, -2}), embedded = arena_.Put(Matrix(5, features, 0.5f));
      const Tensor on = Device(embedded);
      for (const Tensor& drawn : {Tensor(), arena_.PutInts({5, 1, -4})}) {
        for (const bool accumulate : {false, true}) {
          cpu_->Embed(embedded, ids, table, 2, accumulate, drawn);
          cuda_->Embed(on, Device(ids), {Device(table.weight), Device(table.scale)}, 2, accumulate, Device(drawn));
          EXPECT_TRUE(SameBits(Got(on), Get(embedded))) << Name(dtype);
        }
      }
    }
    const Tensor gathered = Put(Matrix(3, features));
    cuda_->GatherRows(gathered, Put(y), Device(arena_.PutInts({8, 2, 2})));
    for (const auto& [to, from] : {std::pair{0, 8}, {1, 2}, {2, 2}}) {
      EXPECT_TRUE(SameBits(RowsOf(Got(gathered), to, 1), RowsOf(y, from, 1)));
    }
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

// The module under test with kernels of other versions; counts the launches that may overlap.
struct Versions {
  int32_t binary, ptx;
};
Versions versions;
int overlapping_launches;
const DejavuCudaModule* ModuleOfVersions() {
  static DejavuCudaModule module;
  module = *simt::ModuleUnderTest();
  module.kernel_info = [](DejavuCudaContext* context, int32_t kernel, DejavuCudaKernel* info) {
    const int result = simt::ModuleUnderTest()->kernel_info(context, kernel, info);
    info->binary_version = versions.binary;
    info->ptx_version = versions.ptx;
    return result;
  };
  module.launch = [](DejavuCudaContext* context, const DejavuCudaLaunch* launch) {
    overlapping_launches += launch->overlaps;
    DejavuCudaLaunch apart = *launch;
    apart.overlaps = 0;  // the real kernels may be of any version
    return simt::ModuleUnderTest()->launch(context, &apart);
  };
  return &module;
}

TEST_P(CudaBackendTest, LaunchesOverlapOnlyWhereTheKernelsHaveGridWait) {
  for (const auto& [binary, ptx, overlap] :
       {std::tuple{80, 80, false}, {90, 80, false}, {90, 90, true}, {120, 89, false}, {120, 120, true}}) {
    versions = {binary, ptx};
    overlapping_launches = 0;
    auto backend = MakeCudaBackend(ModuleOfVersions(), 0);
    ASSERT_TRUE(backend.ok()) << backend.status();
    auto buffer = (*backend)->Allocate(2 * 70 * 4);
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    const Tensor x = buffer->View(0, DType::kFloat32, 2, 70);
    for (int i = 0; i < 3; ++i) (*backend)->Add(x, x);
    (*backend)->Synchronize();
    EXPECT_EQ(overlapping_launches > 0, overlap) << binary << " " << ptx;
  }
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
