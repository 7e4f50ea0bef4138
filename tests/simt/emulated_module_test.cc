// The emulated CUDA module over sample kernels of its own.
#include "emulated_module.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace dejavu::simt {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

struct AddParams {
  float* y;  // [blocks]
  float value;
};
DJ_KERNEL(AddTo, AddParams, 32) {
  if (threadIdx.x == 0) p.y[blockIdx.x] += p.value;
}

struct FirstParams {
  uint32_t* first;  // the block that came first; -1 before
};
DJ_KERNEL(FirstBlock, FirstParams, 1) {
  if (*p.first == 0xFFFFFFFF) *p.first = blockIdx.x;
}

DJ_KERNEL(Diverges, AddParams, 32) {
  if (threadIdx.x == 0) __syncthreads();
}

struct CopyParams {
  const float* from;
  float* to;
  bool waits;
};
DJ_KERNEL(CopyOne, CopyParams, 1) {
  if (p.waits) cuda::GridWait();
  const float value = *p.from;
  if (!p.waits) cuda::GridWait();
  *p.to = value;
}

// Keeps to the rules, or lets the next launch begin before this one may go on.
struct LinkParams {
  float* y;
  bool lets_early;
};
DJ_KERNEL(AddAndLet, LinkParams, 1) {
  if (p.lets_early) cuda::GridLaunchDependents();
  cuda::GridWait();
  if (!p.lets_early) cuda::GridLaunchDependents();
  *p.y += 1;
}

DJ_KERNEL(WritesEarly, AddParams, 1) {
  *p.y += p.value;
  cuda::GridWait();
}

#define SAMPLE_KERNELS(X)    \
  X(AddTo, AddParams)        \
  X(FirstBlock, FirstParams) \
  X(Diverges, AddParams) X(CopyOne, CopyParams) X(AddAndLet, LinkParams) X(WritesEarly, AddParams)
enum : int32_t { kAddTo, kFirstBlock, kDiverges, kCopyOne, kAddAndLet, kWritesEarly, kKernels };

}  // namespace

std::span<const ModuleKernel> ModuleKernels() {
  static const std::vector<ModuleKernel> kernels = {SAMPLE_KERNELS(DEJAVU_SIMT_MODULE_KERNEL)};
  return kernels;
}

namespace {

// A copy of one piece.
DejavuCudaCopy Piece(void* to, const void* from, int64_t bytes) {
  return {.to = to, .to_stride = 0, .from = from, .from_stride = 0, .row_bytes = bytes, .rows = 1};
}

class EmulatedModuleTest : public testing::Test {
 protected:
  EmulatedModuleTest() {
    GetEmulation() = {};
    EXPECT_EQ(module_.open(0, &context_, &info_), 0);
    EXPECT_EQ(module_.allocate(context_, sizeof(float) * kFloats, reinterpret_cast<void**>(&device_)), 0);
    EXPECT_EQ(module_.allocate_pinned(context_, sizeof(float) * kFloats, reinterpret_cast<void**>(&pinned_)), 0);
  }
  ~EmulatedModuleTest() override {
    EXPECT_EQ(module_.free(context_, device_), 0);
    module_.free_pinned(context_, pinned_);
    module_.close(context_);
  }

  template <typename Params>
  int Launch(int32_t kernel, const Params& params, uint32_t blocks = 1, uint32_t threads = 1, bool overlaps = false) {
    const DejavuCudaLaunch launch = {.kernel = kernel,
                                     .grid = {blocks, 1, 1},
                                     .block = {threads, 1, 1},
                                     .shared_bytes = 0,
                                     .overlaps = overlaps,
                                     .params = &params,
                                     .params_bytes = sizeof(Params)};
    return module_.launch(context_, &launch);
  }
  int Upload(const void* from, int64_t bytes) { return module_.upload(context_, {Piece(device_, from, bytes)}); }
  std::vector<float> Downloaded() {
    std::vector<float> values(kFloats);
    EXPECT_EQ(module_.download(context_, {Piece(values.data(), device_, sizeof(float) * kFloats)}), 0);
    return values;
  }
  std::string error() const { return module_.error(); }

  static constexpr int kFloats = 4;
  const DejavuCudaModule& module_ = *EmulatedModule();
  DejavuCudaContext* context_ = nullptr;
  DejavuCudaDevice info_;
  float *device_ = nullptr, *pinned_ = nullptr;
};

TEST_F(EmulatedModuleTest, DescribesItsDevice) {
  EXPECT_EQ(module_.abi_version, DEJAVU_CUDA_ABI_VERSION);
  EXPECT_EQ(info_.compute_major, 9);
  EXPECT_EQ(info_.multiprocessors, 4);
  EXPECT_NE(module_.open(1, &context_, &info_), 0);
  EXPECT_THAT(error(), HasSubstr("no device 1"));
  DejavuCudaKernel kernel;
  EXPECT_EQ(module_.kernel_info(context_, kFirstBlock, &kernel), 0);
  EXPECT_STREQ(kernel.name, "FirstBlock");
  EXPECT_EQ(kernel.ptx_version, 90);
  EXPECT_NE(module_.kernel_info(context_, kKernels, &kernel), 0);
}

TEST_F(EmulatedModuleTest, MemoryIsZeroedAndLimited) {
  EXPECT_THAT(Downloaded(), ElementsAre(0, 0, 0, 0));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(device_) % 256, 0u);
  GetEmulation().memory_bytes = 1000;
  void* memory;
  EXPECT_NE(module_.allocate(context_, 985, &memory), 0);
  EXPECT_EQ(error(), "out of memory: 985 bytes asked for, 984 free");
  EXPECT_EQ(module_.allocate(context_, 984, &memory), 0);
  EXPECT_EQ(module_.free(context_, memory), 0);
  EXPECT_NE(module_.free(context_, pinned_), 0);
}

TEST_F(EmulatedModuleTest, CopiesStridedRows) {
  const float rows[] = {1, 2, 0, 3, 4, 0};
  const DejavuCudaUpload upload = {
      {.to = device_, .to_stride = 8, .from = rows, .from_stride = 12, .row_bytes = 8, .rows = 2}};
  EXPECT_EQ(module_.upload(context_, upload), 0);
  EXPECT_THAT(Downloaded(), ElementsAre(1, 2, 3, 4));
  float column[2];
  const DejavuCudaDownload download = {
      {.to = column, .to_stride = 4, .from = device_ + 1, .from_stride = 8, .row_bytes = 4, .rows = 2}};
  EXPECT_EQ(module_.download(context_, download), 0);
  EXPECT_THAT(column, ElementsAre(2, 4));
}

TEST_F(EmulatedModuleTest, HostMemoryIsNotDeviceMemory) {
  float host[kFloats] = {};
  EXPECT_NE(module_.upload(context_, {Piece(host, device_, 4)}), 0);
  EXPECT_THAT(error(), HasSubstr("not device memory"));
  EXPECT_NE(Upload(host, sizeof(float) * (kFloats + 1)), 0);
  EXPECT_NE(module_.download(context_, {Piece(host, pinned_, 4)}), 0);
}

TEST_F(EmulatedModuleTest, AFetchArrivesWhenTheHostHasWaited) {
  EXPECT_EQ(Launch(kAddTo, AddParams{device_, 5}), 0);
  pinned_[0] = 0;
  EXPECT_EQ(module_.fetch(context_, {Piece(pinned_, device_, 4)}), 0);
  EXPECT_EQ(Launch(kAddTo, AddParams{device_, 1}), 0);
  EXPECT_TRUE(std::isnan(pinned_[0]));
  EXPECT_EQ(module_.synchronize(context_), 0);
  EXPECT_EQ(pinned_[0], 5);
}

TEST_F(EmulatedModuleTest, PinnedMemoryMustNotChangeUnderAnUpload) {
  pinned_[0] = 1;
  EXPECT_EQ(Upload(pinned_, 4), 0);
  EXPECT_EQ(module_.synchronize(context_), 0);
  pinned_[0] = 2;
  EXPECT_EQ(Upload(pinned_, 4), 0);
  pinned_[0] = 3;
  EXPECT_NE(module_.synchronize(context_), 0);
  EXPECT_THAT(error(), HasSubstr("changed while an upload"));
}

TEST_F(EmulatedModuleTest, RefusesLaunchesThatDoNotFitTheKernel) {
  EXPECT_NE(Launch(kKernels, AddParams{}), 0);
  EXPECT_EQ(error(), "no kernel has the number 6");
  EXPECT_NE(Launch(kAddTo, FirstParams{}), 0);
  EXPECT_EQ(error(), "kernel AddTo takes 16 bytes of parameters, not 8");
  EXPECT_NE(Launch(kAddTo, AddParams{}, 1, 33), 0);
  EXPECT_THAT(error(), HasSubstr("a block of (33, 1, 1) threads"));
}

TEST_F(EmulatedModuleTest, AGraphReplaysOverChangedMemory) {
  ASSERT_EQ(module_.begin_capture(context_), 0);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Launch(kAddTo, AddParams{device_, 1}, 2, 32), 0);
  EXPECT_EQ(module_.fetch(context_, {Piece(pinned_, device_, 4)}), 0);
  DejavuCudaGraph* graph;
  ASSERT_EQ(module_.end_capture(context_, &graph), 0);
  EXPECT_EQ(GetEmulation().captured_launches, 3);
  EXPECT_EQ(GetEmulation().all_launches, 0);
  EXPECT_THAT(Downloaded(), ElementsAre(0, 0, 0, 0));

  EXPECT_EQ(module_.replay(context_, graph), 0);
  EXPECT_THAT(Downloaded(), ElementsAre(3, 3, 0, 0));
  EXPECT_EQ(pinned_[0], 3);
  const float ten = 10;
  EXPECT_EQ(Upload(&ten, 4), 0);
  EXPECT_EQ(module_.replay(context_, graph), 0);
  EXPECT_THAT(Downloaded(), ElementsAre(13, 6, 0, 0));
  EXPECT_THAT(GetEmulation().launches, ElementsAre(6, 0, 0, 0, 0, 0));
  GetEmulation().ResetCounts();
  EXPECT_THAT(GetEmulation().launches, testing::Each(0));
  module_.free_graph(context_, graph);
}

TEST_F(EmulatedModuleTest, ACaptureRefusesWhatAGraphCannotHold) {
  ASSERT_EQ(module_.begin_capture(context_), 0);
  float host = 0;
  void* memory;
  EXPECT_NE(Upload(&host, 4), 0);
  EXPECT_EQ(error(), "upload of pageable memory during a capture");
  EXPECT_NE(module_.download(context_, {Piece(&host, device_, 4)}), 0);
  EXPECT_NE(module_.fetch(context_, {Piece(&host, device_, 4)}), 0);
  const DejavuCudaGemm gemm = {};
  EXPECT_NE(module_.gemm(context_, &gemm), 0);
  EXPECT_EQ(error(), "gemm: the first one cannot be captured");
  EXPECT_NE(module_.synchronize(context_), 0);
  EXPECT_NE(module_.allocate(context_, 4, &memory), 0);
  EXPECT_NE(module_.begin_capture(context_), 0);
  DejavuCudaGraph* graph;
  EXPECT_EQ(module_.end_capture(context_, &graph), 0);
  module_.free_graph(context_, graph);
  EXPECT_NE(module_.end_capture(context_, &graph), 0);
}

TEST_F(EmulatedModuleTest, GemmMultipliesInBothLayoutsThenAddsABiasAndCutsOffWhatIsBelowZero) {
  constexpr int64_t m = 2, n = 3, k = 4;
  for (const bool bfloat16 : {false, true}) {
    for (const bool b_is_kn : {false, true}) {
      std::vector<uint16_t> a(m * k), b(n * k);
      const auto narrow = [&](int x) { return bfloat16 ? cuda::FloatToBFloat16(x) : cuda::FloatToHalf(x); };
      for (int i = 0; i < m * k; ++i) a[i] = narrow(i + 1);
      for (int i = 0; i < n * k; ++i) b[i] = narrow(i - 5);
      std::vector<float> c(m * n, 100);
      const std::vector<float> bias = {-100, 10, 1000};
      const DejavuCudaGemm gemm = {.a = a.data(),
                                   .b = b.data(),
                                   .c = c.data(),
                                   .m = m,
                                   .n = n,
                                   .k = k,
                                   .a_stride = k,
                                   .b_stride = b_is_kn ? n : k,
                                   .c_stride = n,
                                   .bfloat16 = bfloat16,
                                   .b_is_kn = b_is_kn,
                                   .accumulate = b_is_kn,
                                   .relu = bfloat16,
                                   .bias = bfloat16 ? bias.data() : nullptr};
      EXPECT_EQ(module_.gemm(context_, &gemm), 0);
      for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) {
          int sum = b_is_kn ? 100 : 0;
          for (int l = 0; l < k; ++l) sum += (i * k + l + 1) * ((b_is_kn ? l * n + j : j * k + l) - 5);
          EXPECT_EQ(c[i * n + j], bfloat16 ? std::max(0.0f, sum + bias[j]) : sum);
        }
      }
    }
  }
  EXPECT_EQ(GetEmulation().gemms, 4);
}

TEST_F(EmulatedModuleTest, NothingWorksAfterAKernelFailed) {
  EXPECT_NE(Launch(kDiverges, AddParams{}, 1, 32), 0);
  const std::string first = error();
  EXPECT_THAT(first, HasSubstr("kernel Diverges"));
  EXPECT_NE(Launch(kAddTo, AddParams{device_, 1}), 0);
  EXPECT_EQ(error(), first);
  EXPECT_NE(module_.synchronize(context_), 0);
}

TEST_F(EmulatedModuleTest, TheNextLaunchFailsWhenATestAsksForIt) {
  DejavuCudaGraph* graph;
  ASSERT_EQ(module_.begin_capture(context_), 0);
  EXPECT_EQ(Launch(kAddTo, AddParams{device_, 1}), 0);
  ASSERT_EQ(module_.end_capture(context_, &graph), 0);
  EXPECT_EQ(module_.replay(context_, graph), 0);
  GetEmulation().fail_next_launch = true;
  EXPECT_NE(module_.replay(context_, graph), 0);
  EXPECT_EQ(error(), "kernel AddTo: failed as the test asked for");
  EXPECT_NE(module_.synchronize(context_), 0);
  module_.free_graph(context_, graph);
}

TEST_F(EmulatedModuleTest, EveryLaunchHasAnOrderOfItsOwn) {
  std::vector<bool> came_first(8);
  for (GetEmulation().order = 0; GetEmulation().order < 2; ++GetEmulation().order) {
    for (int i = 0; i < 100; ++i) {
      uint32_t first = 0xFFFFFFFF;
      ASSERT_EQ(Launch(kFirstBlock, FirstParams{&first}, 8), 0);
      ASSERT_EQ(module_.synchronize(context_), 0);
      came_first[first] = true;
    }
    EXPECT_EQ(std::count(came_first.begin(), came_first.end(), true), GetEmulation().order == 0 ? 1 : 8);
  }
}

TEST_F(EmulatedModuleTest, AnOverlappingLaunchThatDoesNotWaitFindsStaleMemoryInSomeOrder) {
  for (const bool waits : {true, false}) {
    int stale = 0;
    for (GetEmulation().order = 0; GetEmulation().order < 50; ++GetEmulation().order) {
      const float before = Downloaded()[0];
      EXPECT_EQ(Launch(kAddAndLet, LinkParams{device_, false}), 0);
      EXPECT_EQ(Launch(kCopyOne, CopyParams{device_, device_ + 1, waits}, 1, 1, true), 0);
      const std::vector<float> found = Downloaded();
      EXPECT_EQ(found[0], before + 1);
      stale += found[1] != found[0];
    }
    EXPECT_THAT(stale, testing::AllOf(testing::Ge(waits ? 0 : 10), testing::Le(waits ? 0 : 49)));
  }
}

TEST_F(EmulatedModuleTest, WhatIsTwoLaunchesOldIsStaleOnlyIfALaunchLetsTheNextBeginBeforeItMay) {
  for (const bool lets_early : {false, true}) {
    int stale = 0;
    for (GetEmulation().order = 0; GetEmulation().order < 50; ++GetEmulation().order) {
      EXPECT_EQ(Launch(kAddAndLet, LinkParams{device_, false}), 0);
      EXPECT_EQ(Launch(kAddAndLet, LinkParams{device_ + 2, lets_early}, 1, 1, true), 0);
      EXPECT_EQ(Launch(kCopyOne, CopyParams{device_, device_ + 1, false}, 1, 1, true), 0);
      const std::vector<float> found = Downloaded();
      stale += found[1] != found[0];
    }
    EXPECT_THAT(stale, testing::AllOf(testing::Ge(lets_early ? 3 : 0), testing::Le(lets_early ? 49 : 0)));
  }
}

TEST_F(EmulatedModuleTest, AnOverlappingLaunchMustNotWriteBeforeItHasWaited) {
  int found = 0;
  for (GetEmulation().order = 1; GetEmulation().order < 10 && found == 0; ++GetEmulation().order) {
    EXPECT_EQ(Launch(kAddAndLet, LinkParams{device_, false}), 0);
    found += Launch(kWritesEarly, AddParams{device_ + 1, 1}, 1, 1, true) != 0 || module_.synchronize(context_) != 0;
  }
  EXPECT_EQ(found, 1);
  EXPECT_THAT(error(), HasSubstr("kernel WritesEarly, block (0, 0, 0): changes memory of the device before GridWait"));
}

TEST_F(EmulatedModuleTest, TimeStampsAscend) {
  float ms = -1;
  EXPECT_NE(module_.elapsed_ms(context_, 0, 1, &ms), 0);
  EXPECT_EQ(module_.stamp(context_, 0), 0);
  EXPECT_EQ(module_.stamp(context_, 63), 0);
  EXPECT_EQ(module_.elapsed_ms(context_, 0, 63, &ms), 0);
  EXPECT_GE(ms, 0);
  EXPECT_NE(module_.stamp(context_, 66), 0);
}

TEST_F(EmulatedModuleTest, AddressSanitizerSeesMisusedDeviceMemory) {
  EXPECT_DEATH(Launch(kAddTo, AddParams{device_, 1}, kFloats + 1), "heap-buffer-overflow");
  float* freed;
  ASSERT_EQ(module_.allocate(context_, 4, reinterpret_cast<void**>(&freed)), 0);
  ASSERT_EQ(module_.free(context_, freed), 0);
  EXPECT_DEATH(Launch(kAddTo, AddParams{freed, 1}), "heap-use-after-free");
}

}  // namespace
}  // namespace dejavu::simt
