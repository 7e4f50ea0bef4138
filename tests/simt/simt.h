// CUDA kernels on the CPU, for tests: what kernels/cuda/device.h stands on where the compiler is not nvcc. A launch
// runs its blocks one after another and the threads of a block as fibers that switch only where threads meet: barriers,
// warp shuffles and votes, mma. Which thread goes on is drawn from the launch's `order`, so that a result which hangs
// on luck differs between orders. Shared memory is NaN before every block and lies on the heap in its exact size, where
// AddressSanitizer sees what runs over. Threads that cannot meet (divergent barriers, wrong masks) end the launch with
// a status that names kernel, block, thread and line.
//
// Launches that may overlap do: while one runs, the first block of the next goes as far as its GridWait, at the
// earliest moment that the rules of programmatic dependent launch allow, or at a later one. So what a kernel reads too
// early is not there yet, and what it writes too early is found.
//
// Not seen: races between two places where threads meet, blocks that wait for other blocks (they never end), what a
// memory order would break, bank conflicts and anything about speed.
//
// Any thread may launch; a launch stays on its thread. CUDA's own names stand in the global namespace, as in CUDA.
#ifndef TESTS_SIMT_SIMT_H_
#define TESTS_SIMT_SIMT_H_

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <type_traits>

#include "absl/status/status.h"
#include "kernels/base/float16.h"

namespace dejavu::simt {

struct Dim3 {
  uint32_t x, y, z;
  constexpr Dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
  constexpr uint64_t size() const { return uint64_t{x} * y * z; }
};

inline constexpr uint32_t kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xFFFFFFFF;
inline constexpr uint32_t kMostThreads = 1024;         // of a block
inline constexpr size_t kMostStaticShared = 48 << 10;  // bytes of a block
inline constexpr size_t kMostShared = 227 << 10;

// What DJ_KERNEL(Name, Params, threads) makes of Name.
template <typename Params>
struct Kernel {
  const char* name;
  uint32_t most_threads;
  void (*body)(const Params& p);
};

struct Launch {
  Dim3 grid = {}, block = {};
  size_t shared_bytes = 0;  // dynamic
  uint64_t order = 0;       // of blocks and threads; 0: ascending
  bool overlaps = false;    // may begin before the launch before it has ended: every thread must call GridWait
};

// A launch with its kernel and parameters.
struct Prepared {
  const char* name;
  uint32_t most_threads;
  Launch launch;
  std::function<void()> body;  // of a thread
};
template <typename Params>
Prepared Prepare(const Kernel<Params>& kernel, const std::type_identity_t<Params>& params, const Launch& launch) {
  return {kernel.name, kernel.most_threads, launch, [body = kernel.body, params] { body(params); }};
}

// As a stream does, one after another but for those that may overlap. A launch that changes anything of `watched`
// before its GridWait fails.
using Memory = std::span<const char>;
absl::Status Run(std::span<const Prepared> launches, std::span<const Memory> watched = {});

template <typename Params>
absl::Status Run(const Kernel<Params>& kernel, const std::type_identity_t<Params>& params, const Launch& launch) {
  const Prepared prepared = Prepare(kernel, params, launch);
  return Run({&prepared, 1});
}

// From here on: called by the threads of a kernel.
// A line of a kernel, by default the caller's. (clang 14 has no std::source_location.)
struct Where {
  const char* file;
  int line;
  static constexpr Where Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Where&) const = default;
};

// Ends the launch with an error of this thread; does not return.
[[noreturn]] void Fail(const std::string& message);

// The threads of the block meet. Returns for how many of them `predicate` holds.
int MeetBlock(const char* what, bool predicate, Where where);

// The lanes of `mask` meet at one line; the last to come runs `exchange` over the operands of all, by lane.
using Exchange = void (*)(uint32_t mask, void* const* operands);
void MeetWarp(const char* what, uint32_t mask, void* operand, Exchange exchange, Where where);

uint32_t Lane();

// The same memory for all threads of the block; `site` tells one array from another.
void* StaticShared(const void* site, size_t bytes);
void* DynamicShared();

template <typename T>
T Shuffle(const char* what, uint32_t mask, T value, uint32_t source, Where where) {
  static_assert(sizeof(T) == 4 && std::is_arithmetic_v<T>);
  if ((mask >> source & 1) == 0) Fail("a shuffle reads from a lane that its mask leaves out");
  struct Operand {
    T value, result;
    uint32_t source;
  } operand{value, value, source};
  MeetWarp(
      what, mask, &operand,
      [](uint32_t mask, void* const* operands) {
        for (; mask != 0; mask &= mask - 1) {
          auto* mine = static_cast<Operand*>(operands[std::countr_zero(mask)]);
          mine->result = static_cast<Operand*>(operands[mine->source])->value;
        }
      },
      where);
  return operand.result;
}

uint32_t Vote(const char* what, uint32_t mask, bool predicate, Where where);

template <typename T>
T Replace(T* address, T value) {
  const T before = *address;
  *address = value;
  return before;
}

}  // namespace dejavu::simt

#define DJ_KERNEL(Name, Params, threads)                                            \
  inline void Name##Body(const Params& p);                                          \
  inline constexpr ::dejavu::simt::Kernel<Params> Name{#Name, threads, Name##Body}; \
  inline void Name##Body([[maybe_unused]] const Params& p)
#define DJ_WIDE_KERNEL DJ_KERNEL
#define DJ_SLIM_KERNEL DJ_KERNEL
#define DJ_DEVICE inline
#define DJ_SHARED(T, name, N)           \
  static constinit char name##Site = 0; \
  auto& name = *static_cast<std::type_identity_t<T>(*)[N]>(::dejavu::simt::StaticShared(&name##Site, sizeof(T) * (N)))
#define DJ_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::dejavu::simt::DynamicShared())

inline constinit thread_local dejavu::simt::Dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(dejavu::simt::Where where = dejavu::simt::Where::Here()) {
  dejavu::simt::MeetBlock("__syncthreads", false, where);
}
inline int __syncthreads_count(int predicate, dejavu::simt::Where where = dejavu::simt::Where::Here()) {
  return dejavu::simt::MeetBlock("__syncthreads_count", predicate != 0, where);
}
inline int __syncthreads_or(int predicate, dejavu::simt::Where where = dejavu::simt::Where::Here()) {
  return dejavu::simt::MeetBlock("__syncthreads_or", predicate != 0, where) != 0;
}

inline void __syncwarp(uint32_t mask = dejavu::simt::kAllLanes,
                       dejavu::simt::Where where = dejavu::simt::Where::Here()) {
  dejavu::simt::MeetWarp(
      "__syncwarp", mask, nullptr, [](uint32_t, void* const*) {}, where);
}

// As in CUDA: `width` (a power of two) cuts the warp into parts; up and down keep the own value at a part's edge.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32,
              dejavu::simt::Where where = dejavu::simt::Where::Here()) {
  const uint32_t lane = dejavu::simt::Lane(), part = width - 1;
  return dejavu::simt::Shuffle("__shfl_sync", mask, value, (lane & ~part) | (source & part), where);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32,
                  dejavu::simt::Where where = dejavu::simt::Where::Here()) {
  const uint32_t lane = dejavu::simt::Lane(), source = lane ^ bits;
  const bool within = source < ((lane & ~(width - 1)) + width);  // lanes of earlier parts may be read
  return dejavu::simt::Shuffle("__shfl_xor_sync", mask, value, within ? source : lane, where);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   dejavu::simt::Where where = dejavu::simt::Where::Here()) {
  const uint32_t lane = dejavu::simt::Lane(), part = width - 1;
  const bool within = (lane & part) + delta <= part;
  return dejavu::simt::Shuffle("__shfl_down_sync", mask, value, within ? lane + delta : lane, where);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 dejavu::simt::Where where = dejavu::simt::Where::Here()) {
  const uint32_t lane = dejavu::simt::Lane(), part = width - 1;
  const bool within = (lane & part) >= delta;
  return dejavu::simt::Shuffle("__shfl_up_sync", mask, value, within ? lane - delta : lane, where);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, dejavu::simt::Where where = dejavu::simt::Where::Here()) {
  return dejavu::simt::Vote("__ballot_sync", mask, predicate != 0, where);
}
inline int __any_sync(uint32_t mask, int predicate, dejavu::simt::Where where = dejavu::simt::Where::Here()) {
  return dejavu::simt::Vote("__any_sync", mask, predicate != 0, where) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, dejavu::simt::Where where = dejavu::simt::Where::Here()) {
  return dejavu::simt::Vote("__all_sync", mask, predicate != 0, where) == mask;
}

inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __ffs(uint32_t bits) { return bits == 0 ? 0 : std::countr_zero(bits) + 1; }
inline int __clz(uint32_t bits) { return std::countl_zero(bits); }
// Byte i is that of `low` (0 ... 3) and `high` (4 ... 7) which nibble i of `selector` names.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = uint64_t{high} << 32 | low;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) bytes |= static_cast<uint32_t>(both >> (selector >> (4 * i) & 7) * 8 & 0xFF) << (8 * i);
  return bytes;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline void __threadfence() {}

// Threads switch only where they meet, so plain arithmetic is atomic.
inline int atomicAdd(int* address, int value) { return dejavu::simt::Replace(address, *address + value); }
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  return dejavu::simt::Replace(address, *address + value);
}
inline uint32_t atomicOr(uint32_t* address, uint32_t value) { return dejavu::simt::Replace(address, *address | value); }

inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

// Our own: the names that kernels/cuda/device.h defines for nvcc.
namespace dejavu::cuda {

struct alignas(16) Vector16 {
  uint32_t w[4];
};

inline Vector16 LoadVector(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
    simt::Fail("a load of 16 bytes: the address is not aligned to 16 bytes");
  return *static_cast<const Vector16*>(p);
}
inline Vector16 LoadStream(const void* p) { return LoadVector(p); }
inline Vector16 LoadShared(const void* p) { return LoadVector(p); }
inline float LoadConstant(const float* p) { return *p; }
inline int32_t LoadOld(const int32_t* p) { return *p; }

inline float HalfToFloat(uint16_t bits) { return FloatFromFloat16(bits); }
inline uint16_t FloatToHalf(float value) { return Float16FromFloat(value); }
inline float BFloat16ToFloat(uint16_t bits) { return FloatFromBFloat16(bits); }
uint16_t FloatToBFloat16(float value);

// d += a b: [16, 8] += [16, 16] [16, 8], of int8 [16, 32] [32, 8]. Fragments as in PTX: mma.m16n8k16, m16n8k32,
// row.col.
void MmaF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where = simt::Where::Here());
void MmaBF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where = simt::Where::Here());
void MmaS8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where = simt::Where::Here());

// cp.async. The target is NaN from the copy's begin until the wait that covers its group: reading it earlier, and
// beginning to overwrite what others still read, both show. The source is read at any moment between the two.
void CopyAsync16(void* shared, const void* global, bool copies = true);
void CopyAsyncCommit();
void FinishCopies(int groups_under_way);
template <int N>
void CopyAsyncWait() {
  FinishCopies(N);
}

// ldmatrix, as kernels/cuda/device.h says.
Vector16 LoadMatrices(const void* shared, simt::Where where = simt::Where::Here());
Vector16 LoadMatricesTransposed(const void* shared, simt::Where where = simt::Where::Here());

// Programmatic dependent launch.
void GridWait();
void GridLaunchDependents();

}  // namespace dejavu::cuda

#endif  // TESTS_SIMT_SIMT_H_
