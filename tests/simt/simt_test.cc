// The emulator by sample kernels: blocks, launches and memory, and which mistakes it shows.
#include "simt.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "simt_testing.h"

namespace dejavu::simt {
namespace {

using cuda::Vector16;
using testing::AllOf;
using testing::HasSubstr;

// Sum of a block's integers: shuffles within warps, then shared memory.
struct SumParams {
  const int* x;  // [blocks, threads]
  int* y;        // [blocks]
  bool barrier = true;
};
DJ_KERNEL(BlockSum, SumParams, 256) {
  DJ_SHARED(int, sums, 8);
  int sum = p.x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if (p.barrier) __syncthreads();
  if (threadIdx.x != 0) return;
  int total = 0;
  for (int warp = 0; warp < 8; ++warp) total += sums[warp];
  p.y[blockIdx.x] = total;
}

std::vector<int> BlockSums(uint64_t order, bool barrier) {
  std::vector<int> x(3 * 256), y(3);
  std::iota(x.begin(), x.end(), 1);
  ExpectRuns(BlockSum, {x.data(), y.data(), barrier}, {.grid = 3, .block = 256, .order = order});
  return y;
}

const std::vector<int> kBlockSums = {32896, 98432, 163968};

TEST(Simt, BlocksReduceToTheSameSumInEveryOrder) {
  for (uint64_t order = 0; order < kOrders; ++order) EXPECT_EQ(BlockSums(order, true), kBlockSums) << order;
}

TEST(Simt, ARemovedBarrierShowsInSomeOrder) {
  int wrong = 0;
  for (uint64_t order = 0; order < kOrders; ++order) wrong += BlockSums(order, false) != kBlockSums;
  EXPECT_GE(wrong, 40);
}

// Every thread takes over what its left neighbour wrote.
struct NeighbourParams {
  float* y;  // [threads]
};
DJ_KERNEL(NeighbourWithoutBarrier, NeighbourParams, 64) {
  DJ_DYNAMIC_SHARED(float, x);
  x[threadIdx.x] = static_cast<float>(threadIdx.x);
  p.y[threadIdx.x] = threadIdx.x == 0 ? 0 : x[threadIdx.x - 1];
}

TEST(Simt, WhatIsRightInTheNaturalOrderByLuckIsNanInOthers) {
  for (uint64_t order = 0; order < kOrders; ++order) {
    std::vector<float> y(64);
    ExpectRuns(NeighbourWithoutBarrier, {y.data()}, {.block = 64, .shared_bytes = 64 * sizeof(float), .order = order});
    EXPECT_EQ(std::isnan(std::accumulate(y.begin(), y.end(), 0.0f)), order != 0) << order;
  }
}

// Shared memory holds nothing of the block before.
struct PoisonParams {
  uint32_t* found;  // [blocks, 2]
};
DJ_KERNEL(FindsSharedMemory, PoisonParams, 1) {
  DJ_SHARED(uint32_t, fixed, 3);
  DJ_DYNAMIC_SHARED(uint32_t, dynamic);
  p.found[2 * blockIdx.x] = fixed[2];
  p.found[2 * blockIdx.x + 1] = dynamic[1];
  fixed[2] = dynamic[1] = 0;
}

TEST(Simt, SharedMemoryIsNanBeforeEveryBlock) {
  std::vector<uint32_t> found(6);
  ExpectRuns(FindsSharedMemory, {found.data()}, {.grid = 3, .shared_bytes = 8});
  EXPECT_THAT(found, testing::Each(0xFFFFFFFF));
}

// Mistakes by number, so that each is a line of one kernel.
enum Mistake {
  kBarrierInOneBranch,
  kBarrierAfterReturn,
  kTwoBarriers,
  kMaskWithoutCaller,
  kMaskWithEndedLanes,
  kMaskBeyondBlock,
  kMixedCollectives,
  kDifferentMasks,
  kSourceOutsideMask,
  kMisalignedLoad,
  kMisalignedSharedLoad,
  kMisalignedCopy,
  kCopyBeyondShared,
  kCopyFromBeyond,
  kTooMuchStaticShared,
};
struct MistakeParams {
  Mistake mistake;
  const char* global;  // aligned to 16 bytes
};
DJ_KERNEL(MakesMistake, MistakeParams, 64) {
  DJ_DYNAMIC_SHARED(char, shared);
  const uint32_t thread = threadIdx.x;
  switch (p.mistake) {
    case kBarrierInOneBranch:
      if (thread < 48) __syncthreads();
      __syncwarp();
      break;
    case kBarrierAfterReturn:
      if (thread == 5) return;
      __syncthreads();
      break;
    case kTwoBarriers:
      if (thread < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case kMaskWithoutCaller:
      __ballot_sync(0x0000FFFF, 1);
      break;
    case kMaskWithEndedLanes:
      if (thread % 32 == 7) return;
      __shfl_sync(kAllLanes, 1, 0);
      break;
    case kMaskBeyondBlock:
      __any_sync(kAllLanes, 1);
      break;
    case kMixedCollectives:
      if (thread < 16) {
        __ballot_sync(kAllLanes, 1);
      } else {
        __shfl_sync(kAllLanes, 1, 0);
      }
      break;
    case kDifferentMasks:
      __syncwarp(thread < 16 ? 0x1FFFF : kAllLanes);
      break;
    case kSourceOutsideMask:
      if (thread < 16) __shfl_sync(0xFFFF, 1, 16);
      break;
    case kMisalignedLoad:
      cuda::LoadStream(p.global + 8);
      break;
    case kMisalignedSharedLoad:
      cuda::LoadShared(shared + 8);
      break;
    case kMisalignedCopy:
      cuda::CopyAsync16(shared, p.global + 4);
      break;
    case kCopyBeyondShared:
      cuda::CopyAsync16(shared + 64, p.global);
      break;
    case kCopyFromBeyond:
      cuda::CopyAsync16(shared, p.global + 32);
      break;
    case kTooMuchStaticShared: {
      DJ_SHARED(float, large, 12289);
      large[thread] = 0;
    }
  }
}

std::string ErrorOf(Mistake mistake, uint64_t order, uint32_t threads = 64) {
  alignas(16) const char global[32] = {};
  return Error(MakesMistake, {mistake, global}, {.grid = {1, 2}, .block = threads, .shared_bytes = 64, .order = order});
}

TEST(Simt, ThreadsThatCannotMeetAreReported) {
  for (uint64_t order = 0; order < kOrders; ++order) {
    EXPECT_THAT(ErrorOf(kBarrierInOneBranch, order), AllOf(HasSubstr("__syncthreads"), HasSubstr("__syncwarp")));
    EXPECT_THAT(ErrorOf(kBarrierAfterReturn, order),
                AllOf(HasSubstr("__syncthreads"), HasSubstr("thread (5, 0, 0) has ended")));
    EXPECT_THAT(ErrorOf(kTwoBarriers, order), HasSubstr("divergent barrier"));
    EXPECT_THAT(ErrorOf(kMaskWithoutCaller, order), HasSubstr("leaves out the calling lane"));
    EXPECT_THAT(ErrorOf(kMaskWithEndedLanes, order), AllOf(HasSubstr("__shfl_sync"), HasSubstr("has ended")));
    EXPECT_THAT(ErrorOf(kMaskBeyondBlock, order, 20), HasSubstr("the block has no lane 20"));
    EXPECT_THAT(ErrorOf(kMixedCollectives, order), AllOf(HasSubstr("__ballot_sync"), HasSubstr("__shfl_sync")));
    EXPECT_THAT(ErrorOf(kDifferentMasks, order), AllOf(HasSubstr("mask 0001ffff"), HasSubstr("mask ffffffff")));
    EXPECT_THAT(ErrorOf(kSourceOutsideMask, order), HasSubstr("a lane that its mask leaves out"));
  }
}

TEST(Simt, AnErrorNamesKernelBlockThreadAndLine) {
  EXPECT_THAT(
      ErrorOf(kBarrierAfterReturn, 0),
      testing::MatchesRegex("kernel MakesMistake, block \\(0, 0, 0\\), thread \\(0, 0, 0\\) waits in __syncthreads "
                            "at simt_test.cc:[0-9]+, but thread \\(5, 0, 0\\) has ended"));
}

TEST(Simt, MisusedMemoryIsReported) {
  EXPECT_THAT(ErrorOf(kMisalignedLoad, 0), HasSubstr("not aligned to 16 bytes"));
  EXPECT_THAT(ErrorOf(kMisalignedSharedLoad, 0), HasSubstr("not aligned to 16 bytes"));
  EXPECT_THAT(ErrorOf(kMisalignedCopy, 0), HasSubstr("the source is not aligned to 16 bytes"));
  EXPECT_THAT(ErrorOf(kCopyBeyondShared, 0), HasSubstr("beyond shared memory"));
  EXPECT_THAT(ErrorOf(kCopyFromBeyond, 0), HasSubstr("CopyAsync16 reads beyond its memory"));
  EXPECT_THAT(ErrorOf(kTooMuchStaticShared, 0), HasSubstr("49156 bytes of static shared memory"));
}

TEST(Simt, ImpossibleLaunchesAreRefused) {
  const SumParams params = {};
  EXPECT_THAT(Error(BlockSum, params, {.block = 257}),
              HasSubstr("a block of (257, 1, 1) threads; the kernel allows 256"));
  EXPECT_THAT(Error(BlockSum, params, {.grid = {1, 0}}), HasSubstr("a grid of (1, 0, 1)"));
  EXPECT_THAT(Error(BlockSum, params, {.grid = {1, 65536}}), HasSubstr("a grid of (1, 65536, 1)"));
  EXPECT_THAT(Error(BlockSum, params, {.shared_bytes = kMostShared + 1}), HasSubstr("dynamic shared memory"));
}

struct OverrunParams {
  int of;  // 0: static, 1: dynamic, 2: global
  int at;
  const char* global;  // [36]
  float* y;
};
DJ_KERNEL(Overruns, OverrunParams, 32) {
  DJ_SHARED(float, fixed, 5);
  DJ_DYNAMIC_SHARED(float, dynamic);
  __syncthreads();
  if (threadIdx.x != 3) return;
  if (p.of == 0) fixed[p.at] = 1;
  if (p.of == 1) dynamic[p.at] = 1;
  if (p.of == 2) *p.y = __uint_as_float(cuda::LoadStream(p.global + p.at).w[3]);
}

void Overrun(int of, int at) {
  std::unique_ptr<char[]> global(new char[36]());
  float y;
  ExpectRuns(Overruns, {of, at, global.get(), &y}, {.block = 32, .shared_bytes = 12});
}

TEST(SimtDeathTest, AddressSanitizerSeesOverrunsAndTheirThread) {
  Overrun(0, 4);
  Overrun(1, 2);
  Overrun(2, 16);
  const char* const report = "heap-buffer-overflow|out of bounds";
  EXPECT_DEATH(Overrun(0, 5), report);
  EXPECT_DEATH(Overrun(1, 3), report);
  EXPECT_DEATH(Overrun(2, 32), report);
  EXPECT_DEATH(Overrun(1, 3), "in kernel Overruns, block \\(0, 0, 0\\), thread \\(3, 0, 0\\)");
}

// A failed launch unwinds its threads; the next one uses their stacks.
TEST(Simt, LaunchesAfterAFailedOneRun) {
  for (uint64_t order = 0; order < 5; ++order) {
    EXPECT_NE(ErrorOf(kMixedCollectives, order), "");
    EXPECT_EQ(BlockSums(order, true), kBlockSums);
  }
}

}  // namespace
}  // namespace dejavu::simt
