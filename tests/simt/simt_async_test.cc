// The emulator by sample kernels: launches that overlap and asynchronous copies, and which mistakes show.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "simt.h"
#include "simt_testing.h"

namespace dejavu::simt {
namespace {

using cuda::Vector16;
using testing::AllOf;
using testing::Contains;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr int kBlocks = 4, kThreads = 64;

// A launch of several: adds 1 to x per block, and tells what it found elsewhere before and after GridWait.
enum class Lets { kNothing, kBeforeWait, kAfterWait };  // the next launch begin
struct LinkParams {
  int* x = nullptr;
  const int* looks_at = nullptr;
  int *early = nullptr, *late = nullptr;  // [kBlocks]
  Lets lets = Lets::kAfterWait;
  bool waits = true, writes_early = false, fails = false;
};
DJ_KERNEL(Link, LinkParams, kThreads) {
  const bool last = threadIdx.x == kThreads - 1;
  const int early = *p.looks_at;
  if (p.writes_early && last) atomicAdd(p.x, 1);
  if (p.lets == Lets::kBeforeWait) cuda::GridLaunchDependents();
  if (p.waits || threadIdx.x != 7) cuda::GridWait();
  if (p.lets == Lets::kAfterWait) cuda::GridLaunchDependents();
  if (p.fails && !last) __syncthreads();
  if (!p.writes_early && threadIdx.x == 0) atomicAdd(p.x, 1);
  if (!last) return;
  p.early[blockIdx.x] = early;
  p.late[blockIdx.x] = *p.looks_at;
}

// Launches in a row, of which each may overlap with the one before it. What they add to and tell is by launch.
struct Row {
  explicit Row(const std::vector<LinkParams>& links) : x(links.size()), params(links) {
    early.resize(links.size(), std::vector<int>(kBlocks, -1));
    late = early;
  }

  // Each looks at the x of `back` launches before it.
  absl::Status Run(size_t back, uint64_t order) {
    std::vector<Prepared> launches;
    for (size_t i = 0; i < params.size(); ++i) {
      LinkParams p = params[i];
      p.x = &x[i];
      p.looks_at = &x[i < back ? i : i - back];
      p.early = early[i].data();
      p.late = late[i].data();
      launches.push_back(Prepare(
          Link, p, {.grid = kBlocks, .block = kThreads, .order = order == 0 ? 0 : 10 * order + i, .overlaps = true}));
    }
    const Memory watched[] = {{reinterpret_cast<const char*>(x.data()), x.size() * sizeof(int)}};
    return simt::Run(launches, watched);
  }
  int Early(size_t i) const { return *std::ranges::min_element(early[i]); }

  std::vector<int> x;
  std::vector<LinkParams> params;
  std::vector<std::vector<int>> early, late;
};

// What the last of the links found early, by order.
std::vector<int> FoundEarly(const std::vector<LinkParams>& links, size_t back) {
  std::vector<int> found;
  for (uint64_t order = 0; order < kOrders; ++order) {
    Row row(links);
    const absl::Status status = row.Run(back, order);
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_THAT(row.x, Each(kBlocks));
    EXPECT_THAT(row.late.back(), Each(kBlocks));
    found.push_back(row.Early(links.size() - 1));
  }
  return found;
}

TEST(Simt, ALaunchBeginsWithinTheOneBeforeThatLetsIt) {
  const std::vector<int> found = FoundEarly({{}, {}}, 1);
  EXPECT_EQ(found[0], 0);
  EXPECT_GE(std::ranges::count(found, 0), 15);
  EXPECT_THAT(found, AllOf(Contains(1), Contains(2), Contains(3)));
}

TEST(Simt, ALaunchBeginsAfterTheOneBeforeThatLetsNothingBegin) {
  EXPECT_THAT(FoundEarly({{.lets = Lets::kNothing}, {}}, 1), Each(kBlocks));
}

TEST(Simt, WhatIsTwoLaunchesOldIsThereIfTheLaunchBetweenHasWaited) {
  EXPECT_THAT(FoundEarly({{}, {}, {}}, 2), Each(kBlocks));
  EXPECT_THAT(FoundEarly({{.lets = Lets::kNothing}, {.lets = Lets::kBeforeWait}, {}}, 2), Each(kBlocks));
}

TEST(Simt, WhatIsTwoLaunchesOldIsNotThereIfTheLaunchBetweenLetsTheNextBeginTooEarly) {
  const std::vector<int> found = FoundEarly({{}, {.lets = Lets::kBeforeWait}, {}}, 2);
  EXPECT_EQ(found[0], 0);
  EXPECT_THAT(std::ranges::count(found, kBlocks), AllOf(testing::Ge(5), testing::Le(40)));
  EXPECT_EQ(FoundEarly({{}, {.lets = Lets::kBeforeWait}, {.lets = Lets::kBeforeWait}, {}}, 3)[0], 0);
}

TEST(Simt, AnOverlappingLaunchMustWaitInEveryThread) {
  EXPECT_TRUE(Row({{}, {}}).Run(1, 0).ok());
  EXPECT_THAT(std::string(Row({{}, {.waits = false}}).Run(1, 0).message()),
              HasSubstr("thread (7, 0, 0): ended without GridWait"));
  int x[4];
  LinkParams alone = {.x = x, .looks_at = x, .early = &x[1], .late = &x[2], .waits = false};
  ExpectRuns(Link, alone, {.block = kThreads});
}

TEST(Simt, AWriteBeforeGridWaitIsFoundWhereTheLaunchBeginsEarly) {
  int found = 0;
  for (uint64_t order = 0; order < kOrders; ++order) {
    EXPECT_TRUE(Row({{}, {}}).Run(1, order).ok());
    const absl::Status status = Row({{}, {.writes_early = true}}).Run(1, order);
    if (status.ok()) continue;
    EXPECT_THAT(std::string(status.message()), HasSubstr("changes memory of the device before GridWait"));
    ++found;
  }
  EXPECT_GE(found, 30);
}

// Launches that have begun beside one that fails unwind their threads; the next ones use their stacks.
TEST(Simt, LaunchesAfterAFailedOneDoNotRun) {
  for (uint64_t order = 0; order < 10; ++order) {
    Row row({{}, {.lets = Lets::kBeforeWait, .fails = true}, {}, {}});
    EXPECT_THAT(std::string(row.Run(1, order).message()), HasSubstr("kernel Link, block"));
    EXPECT_EQ(row.x[0], kBlocks);
    EXPECT_THAT(std::span(row.x).subspan(2), Each(0));
    EXPECT_THAT(FoundEarly({{.lets = Lets::kNothing}, {}}, 1), Each(kBlocks));
  }
}

// Two groups of copies, looked at before and after each wait.
struct CopyParams {
  const uint32_t* x;        // [threads, 8], aligned to 16 bytes
  uint32_t* y;              // [threads, 3, 2]: the first word of either group, after so many groups have arrived
  bool other_lane = false;  // look at the neighbour's copies
};
DJ_KERNEL(CopiesAsync, CopyParams, 32) {
  DJ_DYNAMIC_SHARED(Vector16, shared);
  const uint32_t thread = threadIdx.x, looked_at = p.other_lane ? thread ^ 1 : thread;
  const auto look = [&](int arrived) {
    __syncwarp();
    for (int group = 0; group < 2; ++group) {
      p.y[(thread * 3 + arrived) * 2 + group] = shared[2 * looked_at + group].w[0];
    }
    __syncwarp();
  };
  for (int group = 0; group < 2; ++group) {
    cuda::CopyAsync16(&shared[2 * thread + group], p.x + (2 * thread + group) * 4);
    cuda::CopyAsyncCommit();
  }
  look(0);
  cuda::CopyAsyncWait<1>();
  look(1);
  cuda::CopyAsyncWait<0>();
  look(2);
}

TEST(Simt, AsyncCopiesArriveAtTheWaitForTheirGroup) {
  alignas(16) uint32_t x[32 * 8];
  std::iota(std::begin(x), std::end(x), 1);
  for (const bool other_lane : {false, true}) {
    for (uint64_t order = 0; order < 10; ++order) {
      std::vector<uint32_t> y(32 * 6);
      ExpectRuns(CopiesAsync, {x, y.data(), other_lane}, {.block = 32, .shared_bytes = 32 * 32, .order = order});
      for (uint32_t thread = 0; thread < 32; ++thread) {
        const uint32_t first = 1 + 8 * (other_lane ? thread ^ 1 : thread), *seen = &y[thread * 6];
        EXPECT_THAT(std::vector(seen, seen + 6), ElementsAre(~0u, ~0u, first, ~0u, first, first + 4));
      }
    }
  }
}

// The source changes under two copies of different groups: before the second one is committed, and after.
struct ChangeParams {
  uint32_t* x;  // [2, 4], aligned to 16 bytes
  uint32_t* y;  // [2]
};
DJ_KERNEL(ChangesTheSource, ChangeParams, 1) {
  DJ_DYNAMIC_SHARED(Vector16, shared);
  cuda::CopyAsync16(&shared[0], p.x);
  cuda::CopyAsyncCommit();
  cuda::CopyAsync16(&shared[1], p.x + 4);
  p.x[0] = p.x[4] = 1;
  cuda::CopyAsyncCommit();
  p.x[0] = p.x[4] = 2;
  cuda::CopyAsyncWait<0>();
  p.y[0] = shared[0].w[0];
  p.y[1] = shared[1].w[0];
}

TEST(Simt, TheSourceOfAnAsyncCopyIsReadAtAnyMomentUpToTheWait) {
  std::set<uint32_t> found[2];
  for (uint64_t order = 0; order < kOrders; ++order) {
    alignas(16) uint32_t x[8] = {};
    uint32_t y[2];
    ExpectRuns(ChangesTheSource, {x, y}, {.shared_bytes = 32, .order = order});
    for (int i = 0; i < 2; ++i) found[i].insert(y[i]);
  }
  for (const auto& values : found) EXPECT_THAT(values, ElementsAre(0, 1, 2));
}

// A ring of two slots: lanes copy for their neighbours.
enum Mistake { kNone, kNoWait, kOneGroupTooFew, kNoMeetingAfterTheWait, kNoMeetingBeforeTheRefill };
constexpr int kStages = 6;
struct RingParams {
  Mistake mistake;
  const float* x;  // [kStages, 32, 4], aligned to 16 bytes
  float* y;        // [32]: the sum over the stages of the neighbour's first element
};
DJ_KERNEL(Ring, RingParams, 32) {
  DJ_DYNAMIC_SHARED(Vector16, slots);  // [2, 32]
  const uint32_t lane = threadIdx.x;
  const auto fill = [&](int stage) {
    if (stage < kStages) cuda::CopyAsync16(&slots[stage % 2 * 32 + lane], p.x + (stage * 32 + lane) * 4);
    cuda::CopyAsyncCommit();
  };
  fill(0);
  fill(1);
  float sum = 0;
  for (int stage = 0; stage < kStages; ++stage) {
    if (p.mistake == kOneGroupTooFew) {
      cuda::CopyAsyncWait<2>();
    } else if (p.mistake != kNoWait) {
      cuda::CopyAsyncWait<1>();
    }
    if (p.mistake != kNoMeetingAfterTheWait) __syncwarp();
    sum += __uint_as_float(slots[stage % 2 * 32 + (lane ^ 1)].w[0]);
    if (p.mistake != kNoMeetingBeforeTheRefill) __syncwarp();
    fill(stage + 2);
  }
  p.y[lane] = sum;
}

int WrongSums(Mistake mistake, uint64_t order) {
  alignas(16) float x[kStages * 32 * 4];
  std::iota(std::begin(x), std::end(x), 1.0f);
  std::vector<float> y(32);
  ExpectRuns(Ring, {mistake, x, y.data()}, {.block = 32, .shared_bytes = 2 * 32 * sizeof(Vector16), .order = order});
  int wrong = 0;
  for (int lane = 0; lane < 32; ++lane) {
    float sum = 0;
    for (int stage = 0; stage < kStages; ++stage) sum += x[(stage * 32 + (lane ^ 1)) * 4];
    wrong += y[lane] != sum;
  }
  return wrong;
}

TEST(Simt, MistakesWithARingOfAsyncCopiesShowInThreeOrders) {
  for (uint64_t order = 0; order < kOrders; ++order) EXPECT_EQ(WrongSums(kNone, order), 0) << order;
  for (const Mistake mistake : {kNoWait, kOneGroupTooFew, kNoMeetingAfterTheWait, kNoMeetingBeforeTheRefill}) {
    int wrong = 0;
    for (uint64_t order = 0; order < 3; ++order) wrong += WrongSums(mistake, order) != 0;
    EXPECT_GE(wrong, 2) << mistake;
  }
}

// Lanes meet between the begin of their copies and the wait, but not after it.
DJ_KERNEL(MeetsTooEarly, RingParams, 32) {
  DJ_DYNAMIC_SHARED(Vector16, slots);
  cuda::CopyAsync16(&slots[threadIdx.x], p.x + threadIdx.x * 4);
  cuda::CopyAsyncCommit();
  __syncwarp();
  cuda::CopyAsyncWait<0>();
  p.y[threadIdx.x] = __uint_as_float(slots[31 - threadIdx.x].w[0]);
}

TEST(Simt, WhatWasCopiedIsNotThereForThreadsThatDoNotMeetTheCopier) {
  alignas(16) float x[32 * 4] = {};
  int missing = 0;
  for (uint64_t order = 0; order < kOrders; ++order) {
    std::vector<float> y(32);
    ExpectRuns(MeetsTooEarly, {kNone, x, y.data()}, {.block = 32, .shared_bytes = 512, .order = order});
    missing += std::ranges::any_of(y, [](float value) { return std::isnan(value); });
  }
  EXPECT_EQ(missing, static_cast<int>(kOrders));
}

}  // namespace
}  // namespace dejavu::simt
