// The emulator by sample kernels: what threads do together, and matrix products.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <random>
#include <set>
#include <vector>

#include "simt.h"
#include "simt_testing.h"

namespace dejavu::simt {
namespace {

// Every collective, by a name that the test computes again.
struct CollectiveParams {
  const int* x;  // [64]
  int* y;        // [kCollectives, 64]
};
enum {
  kIndexed,
  kIndexed8,
  kXor,
  kXor8,
  kDown,
  kDown8,
  kUp,
  kUp8,
  kFloat,
  kBallot,
  kAny,
  kAll,
  kHalves,
  kCount,
  kOr,
  kCollectives
};
DJ_KERNEL(Collectives, CollectiveParams, 64) {
  const int i = threadIdx.x, lane = i % 32, x = p.x[i];
  const auto put = [&](int what, int value) { p.y[what * 64 + i] = value; };
  put(kIndexed, __shfl_sync(kAllLanes, x, 3 * lane + 1));
  put(kIndexed8, __shfl_sync(kAllLanes, x, 3 * lane + 1, 8));
  put(kXor, __shfl_xor_sync(kAllLanes, x, 21));
  put(kXor8, __shfl_xor_sync(kAllLanes, x, 5, 8));
  put(kDown, __shfl_down_sync(kAllLanes, x, 7));
  put(kDown8, __shfl_down_sync(kAllLanes, x, 3, 8));
  put(kUp, __shfl_up_sync(kAllLanes, x, 7));
  put(kUp8, __shfl_up_sync(kAllLanes, x, 3, 8));
  put(kFloat, static_cast<int>(__shfl_sync(kAllLanes, static_cast<float>(x), 31 - lane)));
  put(kBallot, static_cast<int>(__ballot_sync(kAllLanes, x % 2)));
  put(kAny, __any_sync(kAllLanes, x == 100));
  put(kAll, __all_sync(kAllLanes, x >= 100));
  if (lane < 16) {  // halves of a warp meet by themselves, at different lines
    put(kHalves, __shfl_sync(0x0000FFFF, x, 2));
  } else {
    put(kHalves, __shfl_sync(0xFFFF0000, x, 18));
  }
  put(kCount, __syncthreads_count(x % 2));
  put(kOr, __syncthreads_or(x == 100));
}

TEST(Simt, CollectivesDoAsInCuda) {
  std::vector<int> x(64);
  for (int i = 0; i < 64; ++i) x[i] = 100 + (37 * i) % 64;  // 100 is in the first warp
  uint32_t odd[2] = {};
  for (int i = 0; i < 64; ++i) odd[i / 32] |= static_cast<uint32_t>(x[i] % 2) << (i % 32);
  for (uint64_t order = 0; order < kOrders; ++order) {
    std::vector<int> y(kCollectives * 64);
    ExpectRuns(Collectives, {x.data(), y.data()}, {.block = 64, .order = order});
    for (int i = 0; i < 64; ++i) {
      const int lane = i % 32, warp = i - lane, part = i - i % 8;
      const auto got = [&](int what) { return y[what * 64 + i]; };
      EXPECT_EQ(got(kIndexed), x[warp + (3 * lane + 1) % 32]);
      EXPECT_EQ(got(kIndexed8), x[part + (3 * lane + 1) % 8]);
      EXPECT_EQ(got(kXor), x[i ^ 21]);
      EXPECT_EQ(got(kXor8), x[i ^ 5]);
      EXPECT_EQ(got(kDown), x[lane + 7 < 32 ? i + 7 : i]);
      EXPECT_EQ(got(kDown8), x[lane % 8 + 3 < 8 ? i + 3 : i]);
      EXPECT_EQ(got(kUp), x[lane >= 7 ? i - 7 : i]);
      EXPECT_EQ(got(kUp8), x[lane % 8 >= 3 ? i - 3 : i]);
      EXPECT_EQ(got(kFloat), x[warp + 31 - lane]);
      EXPECT_EQ(static_cast<uint32_t>(got(kBallot)), odd[i / 32]);
      EXPECT_EQ(got(kAny), warp == 0);
      EXPECT_EQ(got(kAll), 1);
      EXPECT_EQ(got(kHalves), x[i - i % 16 + 2]);
      EXPECT_EQ(got(kCount), 32);
      EXPECT_EQ(got(kOr), 1);
    }
  }
}

// The indices of what is not zero, ascending: a ballot a warp, counts of the warps before in shared memory.
struct CompactParams {
  const int* x;  // [n]
  int n;
  int* indices;
  int* count;
};
DJ_KERNEL(Compact, CompactParams, 128) {
  DJ_SHARED(int, counts, 4);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int begin = 0;
  for (int base = 0; base < p.n; base += blockDim.x) {
    const int i = base + threadIdx.x;
    const bool taken = i < p.n && p.x[i] != 0;
    const uint32_t votes = __ballot_sync(kAllLanes, taken);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int before = begin + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < 4; ++w) {
      if (w < warp) before += counts[w];
      begin += counts[w];
    }
    if (taken) p.indices[before] = i;
    __syncthreads();
  }
  if (threadIdx.x == 0) *p.count = begin;
}

TEST(Simt, CompactionKeepsTheOrderInEveryOrderOfThreads) {
  std::mt19937 random(1);
  for (uint64_t order = 0; order < kOrders; ++order) {
    const int n = 1 + static_cast<int>(random() % 400), density = static_cast<int>(order % 5);  // 0: none ... 4: all
    std::vector<int> x(n), expected;
    for (int i = 0; i < n; ++i) {
      x[i] = static_cast<int>(random() % 4) < density;
      if (x[i] != 0) expected.push_back(i);
    }
    std::vector<int> indices(expected.size());
    int count = -1;
    ExpectRuns(Compact, {x.data(), n, indices.data(), &count}, {.block = 128, .order = order});
    EXPECT_EQ(indices, expected) << order;
    EXPECT_EQ(count, static_cast<int>(expected.size()));
  }
}

// The last block to finish adds up what the others left: tickets by atomicAdd.
struct TicketParams {
  int* partial;      // [blocks]
  uint32_t* ticket;  // 0 before and after
  uint32_t* blocks_seen;
  int* sum;
};
DJ_KERNEL(LastBlockAdds, TicketParams, 1) {
  p.partial[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  atomicOr(p.blocks_seen, 1u << blockIdx.x);
  __threadfence();
  if (atomicAdd(p.ticket, 1) != gridDim.x - 1) return;
  for (uint32_t i = 0; i < gridDim.x; ++i) atomicAdd(p.sum, p.partial[i]);
  *p.ticket = 0;
}

TEST(Simt, TheLastBlockFindsWhatTheOthersWrote) {
  for (uint64_t order = 0; order < kOrders; ++order) {
    std::vector<int> partial(10);
    uint32_t ticket = 0, seen = 0;
    int sum = 0;
    ExpectRuns(LastBlockAdds, {partial.data(), &ticket, &seen, &sum}, {.grid = 10, .order = order});
    EXPECT_EQ(sum, 55);
    EXPECT_EQ(seen, 0x3FFu);
    EXPECT_EQ(ticket, 0u);
  }
}

struct IndexParams {
  std::set<std::array<uint32_t, 6>>* seen;
};
DJ_KERNEL(RecordsIndices, IndexParams, 64) {
  p.seen->insert({blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z});
}

TEST(Simt, EveryThreadOfEveryBlockRunsOnce) {
  for (uint64_t order = 0; order < 3; ++order) {
    std::set<std::array<uint32_t, 6>> seen;
    ExpectRuns(RecordsIndices, {&seen}, {.grid = {2, 3, 2}, .block = {5, 2, 3}, .order = order});
    EXPECT_EQ(seen.size(), 12u * 30u);
    EXPECT_EQ(*seen.rbegin(), (std::array<uint32_t, 6>{1, 2, 1, 4, 1, 2}));
  }
}

// Fragments as the PTX ISA lists them: element i of a lane's fragment has this row and column.
template <typename T>
struct MmaParams {
  const T* a;     // [16, K]
  const T* b;     // [K, 8]
  const void* c;  // [16, 8]
  void* d;        // [16, 8]
};
template <typename T, typename Sum, int K, typename Multiply>
void LoadMultiplyStore(const MmaParams<T>& p, Multiply multiply) {
  constexpr int E = 4 / sizeof(T), kHalf = K / 2;  // elements a register
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  T a_elements[4 * E], b_elements[2 * E];
  for (int i = 0; i < 4 * E; ++i) {
    const bool upper = (0 <= i && i < E) || (2 * E <= i && i < 3 * E);
    const int row = upper ? group : group + 8;
    const int column = in_group * E + i % E + (i < 2 * E ? 0 : kHalf);
    a_elements[i] = p.a[row * K + column];
  }
  for (int i = 0; i < 2 * E; ++i) b_elements[i] = p.b[(in_group * E + i % E + (i < E ? 0 : kHalf)) * 8 + group];
  uint32_t a[4], b[2];
  std::memcpy(a, a_elements, sizeof a);
  std::memcpy(b, b_elements, sizeof b);
  Sum d[4];
  const auto at = [&](int i) { return (i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) d[i] = static_cast<const Sum*>(p.c)[at(i)];
  multiply(d, a, b);
  for (int i = 0; i < 4; ++i) static_cast<Sum*>(p.d)[at(i)] = d[i];
}
DJ_KERNEL(MultiplyF16, MmaParams<uint16_t>, 32) {
  LoadMultiplyStore<uint16_t, float, 16>(p, [](auto& d, auto& a, auto& b) { cuda::MmaF16(d, a, b); });
}
DJ_KERNEL(MultiplyBF16, MmaParams<uint16_t>, 32) {
  LoadMultiplyStore<uint16_t, float, 16>(p, [](auto& d, auto& a, auto& b) { cuda::MmaBF16(d, a, b); });
}
DJ_KERNEL(MultiplyS8, MmaParams<int8_t>, 32) {
  LoadMultiplyStore<int8_t, int32_t, 32>(p, [](auto& d, auto& a, auto& b) { cuda::MmaS8(d, a, b); });
}

// Small integers, so that no sum is rounded.
template <typename T, typename Sum, int K>
void ExpectMatrixProduct(const Kernel<MmaParams<T>>& kernel, T (*narrow)(float), uint64_t order) {
  std::mt19937 random(order);
  const auto draw = [&] { return static_cast<int>(random() % 41) - 20; };
  std::vector<int> a(16 * K), b(K * 8), c(16 * 8);
  for (auto* matrix : {&a, &b, &c}) std::generate(matrix->begin(), matrix->end(), draw);
  std::vector<T> a_bits, b_bits;
  for (const int x : a) a_bits.push_back(narrow(static_cast<float>(x)));
  for (const int x : b) b_bits.push_back(narrow(static_cast<float>(x)));
  const std::vector<Sum> c_sums(c.begin(), c.end());
  std::vector<Sum> d(16 * 8);
  ExpectRuns(kernel, {a_bits.data(), b_bits.data(), c_sums.data(), d.data()}, {.block = 32, .order = order});
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      int sum = c[i * 8 + j];
      for (int k = 0; k < K; ++k) sum += a[i * K + k] * b[k * 8 + j];
      EXPECT_EQ(d[i * 8 + j], static_cast<Sum>(sum)) << i << " " << j;
    }
  }
}

TEST(Simt, MmaMultipliesMatricesInTheFragmentsOfPtx) {
  for (uint64_t order = 0; order < 10; ++order) {
    ExpectMatrixProduct<uint16_t, float, 16>(MultiplyF16, cuda::FloatToHalf, order);
    ExpectMatrixProduct<uint16_t, float, 16>(MultiplyBF16, cuda::FloatToBFloat16, order);
    ExpectMatrixProduct<int8_t, int32_t, 32>(
        MultiplyS8, [](float x) { return static_cast<int8_t>(x); }, order);
  }
}

struct BitsParams {
  int* y;
};
DJ_KERNEL(CountsBits, BitsParams, 1) {
  const int found[] = {__popc(0xF0F0u), __ffs(0), __ffs(0x80000000u), __ffs(6), __clz(0), __clz(1)};
  std::copy(std::begin(found), std::end(found), p.y);
}

TEST(Simt, BitsAndFloatsAreTakenApartAsInCuda) {
  std::vector<int> y(6);
  ExpectRuns(CountsBits, {y.data()}, {});
  EXPECT_THAT(y, testing::ElementsAre(8, 0, 32, 2, 32, 31));
  EXPECT_EQ(__byte_perm(0x33221100u, 0x77665544u, 0x0C74u), 0x00447744u);
  EXPECT_EQ(__uint_as_float(0x3F800000), 1.0f);
  EXPECT_EQ(__float_as_int(__int_as_float(-5 & 0x7FFFFF)), -5 & 0x7FFFFF);
  EXPECT_EQ(rsqrtf(4.0f), 0.5f);
  EXPECT_EQ(cuda::HalfToFloat(cuda::FloatToHalf(1.0f / 3)), 0.333251953125f);
  EXPECT_EQ(cuda::BFloat16ToFloat(cuda::FloatToBFloat16(1.0f / 3)), 0.333984375f);
  EXPECT_EQ(cuda::FloatToBFloat16(__uint_as_float(0x3F808000)), 0x3F80);  // ties to even
  EXPECT_EQ(cuda::FloatToBFloat16(__uint_as_float(0x3F818000)), 0x3F82);
  EXPECT_TRUE(std::isnan(cuda::BFloat16ToFloat(cuda::FloatToBFloat16(NAN))));
}

}  // namespace
}  // namespace dejavu::simt
