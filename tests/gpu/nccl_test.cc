// NCCL through the module, on the GPUs that there are: a group of one, and one of all of them, a thread for each. Sums
// are right as they are and recorded; how fast they are is printed, for a person to hold against the machine's links.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <thread>
#include <vector>

#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

constexpr double kJoinLimitS = 120, kLimitS = 20;
constexpr int64_t kMostFloats = 16 << 20;
constexpr int kRepeats = 20;

class NcclRank {
 public:
  NcclRank(int rank, int size, const char* id) : rank_(rank), size_(size) {
    DejavuCudaDevice device;
    Try(module_.open(rank, &context_, &device));
    int64_t free_bytes = 0;
    Try(module_.join_group(context_, id, rank, size, kJoinLimitS, &free_bytes));
    EXPECT_GT(free_bytes, 0);
    EXPECT_LE(free_bytes, device.memory_free_bytes);
    Try(module_.limit_group(context_, kLimitS));
    void* memory = nullptr;
    Try(module_.allocate(context_, kMostFloats * sizeof(float), &memory));
    data_ = static_cast<float*>(memory);
  }
  ~NcclRank() {
    module_.free(context_, data_);
    module_.leave_group(context_);
    module_.close(context_);
  }

  // The values of all ranks, as they are and replayed; the second one adds up sums.
  void AddsUp() {
    std::vector<float> values(1000);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(rank_ + 1 + i % 7);
    const int64_t count = std::ssize(values), bytes = count * int64_t{sizeof(float)};
    DejavuCudaCopy copy = {
        .to = data_, .to_stride = bytes, .from = values.data(), .from_stride = bytes, .row_bytes = bytes, .rows = 1};
    Try(module_.upload(context_, {copy}));
    Try(module_.all_reduce(context_, data_, count, 0));
    DejavuCudaGraph* graph = nullptr;
    Try(module_.begin_capture(context_));
    Try(module_.all_reduce(context_, data_, count, 1));
    Try(module_.join_all_reduce(context_));
    Try(module_.end_capture(context_, &graph));
    Try(module_.replay(context_, graph));
    copy.to = values.data();
    copy.from = data_;
    Try(module_.download(context_, {copy}));
    module_.free_graph(context_, graph);
    for (size_t i = 0; i < values.size(); ++i) {
      const auto own = static_cast<float>(size_ * (size_ + 1) / 2 + size_ * static_cast<int>(i % 7));
      ASSERT_EQ(values[i], own * static_cast<float>(size_)) << "rank " << rank_ << ", element " << i;
    }
  }

  // Microseconds of one, by the GPU's clock.
  double Measure(int64_t floats) {
    for (int i = 0; i < 3; ++i) Try(module_.all_reduce(context_, data_, floats, 0));
    Try(module_.stamp(context_, 0));
    for (int i = 0; i < kRepeats; ++i) Try(module_.all_reduce(context_, data_, floats, 0));
    Try(module_.stamp(context_, 1));
    float ms = 0;
    Try(module_.elapsed_ms(context_, 0, 1, &ms));
    return 1e3 * ms / kRepeats;
  }

 private:
  void Try(int result) { ASSERT_EQ(result, 0) << module_.error(); }

  const DejavuCudaModule& module_ = *simt::ModuleUnderTest();
  const int rank_, size_;
  DejavuCudaContext* context_ = nullptr;
  float* data_ = nullptr;
};

void RunGroup(int size) {
  simt::GetEmulation() = simt::Emulation();
  char id[DEJAVU_CUDA_GROUP_ID_BYTES];
  ASSERT_EQ(simt::ModuleUnderTest()->group_id(id), 0) << simt::ModuleUnderTest()->error();
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < size; ++rank) {
    ranks.emplace_back([rank, size, &id] {
      NcclRank group(rank, size, id);
      if (testing::Test::HasFailure()) return;
      group.AddsUp();
      for (int64_t floats = 1 << 10; floats <= kMostFloats; floats *= 4) {
        const double us = group.Measure(floats);
        if (rank != 0) continue;
        const double bytes = static_cast<double>(floats) * sizeof(float);
        std::printf("all-reduce of %9.0f bytes over %d GPUs: %8.1f us, bus bandwidth %6.1f GB/s\n", bytes, size, us,
                    1e-3 * bytes / us * 2 * (size - 1) / size);
      }
    });
  }
  for (std::thread& rank : ranks) rank.join();
}

TEST(NcclGroup, OfOneLeavesTheValuesAsTheyAre) { RunGroup(1); }

TEST(NcclGroup, OfAllGpusAddsUp) {
  int gpus = 1;
  while (simt::HasDevices(gpus + 1)) ++gpus;
  if (gpus == 1) GTEST_SKIP() << "needs two GPUs";
  RunGroup(gpus);
}

}  // namespace
}  // namespace dejavu
