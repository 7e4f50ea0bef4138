// Devices of the module under test as a group: sums are right and stand in their place between the ops around them,
// also in steps that are recorded; whoever cannot join, or does not come, is named everywhere.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/group/thread_group.h"
#include "kernels/layout.h"
#include "tests/simt/module_under_test.h"

namespace dejavu {
namespace {

using testing::HasSubstr;

constexpr int64_t kRows = 3, kCols = 144;  // rows that lie a line further apart than they are long
constexpr auto kPatience = std::chrono::milliseconds(1500);

struct Rank {
  int rank = 0;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Communicator> group;
};

// Runs `body` in a thread for each rank. Returns why ranks could not join; `body` is called only where none says so.
std::vector<absl::Status> OnRanks(const std::vector<const DejavuCudaModule*>& modules,
                                  const std::function<void(Rank&)>& body) {
  auto hosts = MakeThreadGroup(static_cast<int>(modules.size()), {.timeout_s = 60});
  std::vector<absl::Status> statuses(modules.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < modules.size(); ++i) {
    threads.emplace_back([&, i, host = std::move(hosts[i])]() mutable {
      auto backend = MakeCudaBackend(modules[i], static_cast<int>(i));
      ASSERT_TRUE(backend.ok()) << backend.status();
      Rank rank = {static_cast<int>(i), *std::move(backend), nullptr};
      auto group = rank.backend->JoinGroup(std::move(host));
      statuses[i] = group.status();
      if (!group.ok()) return;
      rank.group = *std::move(group);
      body(rank);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return statuses;
}

std::vector<absl::Status> OnRanks(int ranks, const std::function<void(Rank&)>& body) {
  return OnRanks(std::vector<const DejavuCudaModule*>(ranks, simt::ModuleUnderTest()), body);
}

// Small integers and halves: sums of them are exact in any order.
std::vector<float> ValuesOf(int rank, int what, int step) {
  std::vector<float> values(kRows * kCols);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = 0.5f * static_cast<float>((i * 7 + rank * 13 + what * 29 + step * 5) % 61) - 15.0f;
  }
  return values;
}

class DeviceGroup : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    simt::GetEmulation() = simt::Emulation();
    if (!simt::HasDevices(GetParam())) GTEST_SKIP() << "needs " << GetParam() << " devices";
  }
  void TearDown() override { simt::GetEmulation() = simt::Emulation(); }

  const int ranks_ = GetParam();
};

// Ops are held back before and after an all-reduce: x += y is launched before it, and what follows comes after it.
TEST_P(DeviceGroup, AddsUpBetweenTheOpsAroundIt) {
  simt::GetEmulation().order = 5;
  const auto statuses = OnRanks(ranks_, [&](Rank& rank) {
    Backend& dev = *rank.backend;
    Tensor x, y, z, h, weight, bias;
    DeviceLayout layout;
    for (Tensor* tensor : {&x, &y, &z, &h}) layout.Reserve(tensor, DType::kFloat32, kRows, kCols);
    for (Tensor* tensor : {&weight, &bias}) layout.Reserve(tensor, DType::kFloat32, 1, kCols);
    const auto memory = layout.Allocate(dev);
    ASSERT_TRUE(memory.ok()) << memory.status();
    ASSERT_GT(x.stride, x.cols);
    dev.Upload(weight, std::vector<float>(kCols, 0.0f).data());
    dev.Upload(bias, std::vector<float>(kCols, 3.0f).data());
    const NormWeights norm = {weight, bias, 1e-5f};
    constexpr int kSteps = 4;  // as it is, recorded, and replayed twice
    for (int step = 0; step < kSteps; ++step) {
      SCOPED_TRACE(testing::Message() << "rank " << rank.rank << ", step " << step);
      dev.Upload(x, ValuesOf(rank.rank, 0, step).data());
      dev.Upload(y, ValuesOf(rank.rank, 1, step).data());
      dev.Upload(z, ValuesOf(0, 2, step).data());
      dev.Run(9, [&] {
        dev.Add(x, y);
        rank.group->AllReduce(x);
        dev.Add(z, x);
        dev.LayerNorm(h, z, norm);
        rank.group->AllReduceBeside(h, [&] { dev.Add(y, z); });
        dev.Add(z, h);
      });
      std::vector<float> got_x(kRows * kCols), got_y(kRows * kCols), got_z(kRows * kCols), got_h(kRows * kCols);
      dev.Download(got_y.data(), y);
      dev.Download(got_x.data(), x);
      dev.Download(got_z.data(), z);
      dev.Download(got_h.data(), h);
      dev.Synchronize();
      std::vector<float> want_x(kRows * kCols), want_z = ValuesOf(0, 2, step);
      for (int r = 0; r < ranks_; ++r) {
        for (int what : {0, 1}) {
          const std::vector<float> part = ValuesOf(r, what, step);
          for (size_t i = 0; i < part.size(); ++i) want_x[i] += part[i];
        }
      }
      for (size_t i = 0; i < want_z.size(); ++i) want_z[i] += want_x[i];
      std::vector<float> want_y = ValuesOf(rank.rank, 1, step);
      for (size_t i = 0; i < want_y.size(); ++i) want_y[i] += want_z[i];
      const float want_h = 3.0f * static_cast<float>(ranks_);
      for (float& z_of : want_z) z_of += want_h;
      EXPECT_EQ(got_x, want_x);
      EXPECT_EQ(got_y, want_y);
      EXPECT_EQ(got_z, want_z);
      EXPECT_EQ(got_h, std::vector<float>(kRows * kCols, want_h));
    }
    EXPECT_EQ(rank.group->stats().all_reduces, 2 * kSteps);
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST_P(DeviceGroup, HasTheHostsBroadcastAndGather) {
  const auto statuses = OnRanks(ranks_, [&](Rank& rank) {
    EXPECT_EQ(rank.group->rank(), rank.rank);
    EXPECT_EQ(rank.group->size(), ranks_);
    int32_t said = rank.rank == 0 ? 42 : 0;
    rank.group->Broadcast(&said, sizeof said);
    EXPECT_EQ(said, 42);
    std::vector<int32_t> all(ranks_, -1);
    rank.group->Gather(all.data(), &rank.rank, sizeof(int32_t));
    if (rank.rank == 0) {
      EXPECT_EQ(all.back(), ranks_ - 1);
    }
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

// The last rank's module has one function that fails.
template <typename Spoil>
void ExpectNobodyJoins(int ranks, const std::string& why, const Spoil& spoil) {
  DejavuCudaModule spoiled = *simt::ModuleUnderTest();
  spoil(spoiled);
  spoiled.error = [] { return "made to fail"; };
  std::vector<const DejavuCudaModule*> modules(ranks, simt::ModuleUnderTest());
  modules.back() = &spoiled;
  const auto statuses = OnRanks(modules, [](Rank&) { ADD_FAILURE() << "a rank has joined"; });
  for (int rank = 0; rank < ranks; ++rank) {
    EXPECT_EQ(statuses[rank].code(), absl::StatusCode::kUnavailable) << statuses[rank];
    EXPECT_THAT(std::string(statuses[rank].message()), HasSubstr(why)) << rank;
  }
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("rank " + std::to_string(ranks - 1)));
}

TEST_P(DeviceGroup, IsMadeForAllOrForNobody) {
  ExpectNobodyJoins(ranks_, "made to fail",
                    [](DejavuCudaModule& module) { module.group_id = [](char*) { return 1; }; });
  ExpectNobodyJoins(ranks_, "made to fail", [](DejavuCudaModule& module) {
    module.join_group = [](DejavuCudaContext* context, const char* id, int32_t rank, int32_t size, double seconds,
                           int64_t* memory_free_bytes) {
      simt::ModuleUnderTest()->join_group(context, id, rank, size, seconds, memory_free_bytes);
      return 1;
    };
  });
}

TEST_P(DeviceGroup, GivesUpARankThatDoesNotCome) {
  const auto statuses = OnRanks(ranks_, [&](Rank& rank) {
    auto memory = rank.backend->Allocate(64);
    ASSERT_TRUE(memory.ok()) << memory.status();
    const Tensor x = memory->View(0, DType::kFloat32, 1, 16);
    rank.backend->Synchronize();
    rank.group->SetLimit(0.5);
    if (rank.rank == ranks_ - 1) {
      std::this_thread::sleep_for(kPatience);
      return;
    }
    const auto start = std::chrono::steady_clock::now();
    std::string first, later;
    try {
      rank.group->AllReduce(x);
      rank.backend->Synchronize();
    } catch (const PeerLost& lost) {
      first = lost.what();
    }
    EXPECT_THAT(first, HasSubstr("0.5 s"));
    EXPECT_LT(std::chrono::steady_clock::now() - start, kPatience);
    try {
      rank.backend->Synchronize();
    } catch (const PeerLost& lost) {
      later = lost.what();
    }
    EXPECT_EQ(later, first) << "the first failure stays";
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

INSTANTIATE_TEST_SUITE_P(Ranks, DeviceGroup, testing::Values(2, 3, 4));

TEST(DeviceGroupOfOne, IsTheHosts) {
  simt::GetEmulation() = simt::Emulation();
  auto backend = MakeCudaBackend(simt::ModuleUnderTest(), 0);
  ASSERT_TRUE(backend.ok()) << backend.status();
  auto host = SingleRank();
  const Communicator* const same = host.get();
  const auto group = (*backend)->JoinGroup(std::move(host));
  ASSERT_TRUE(group.ok()) << group.status();
  EXPECT_EQ(group->get(), same);
}

}  // namespace
}  // namespace dejavu
