// The instruction set that the CPU's kernels use: the best that the processor has of those that are compiled in. Names,
// best first on x86: avx512-vnni, avx512, avx2-vnni, avx2, sse4, ssse3, scalar (avx512: F, BW, CD, DQ and VL; vnni:
// AVX-512 VNNI or AVX-VNNI). All are of the process.
//
// AVX-512 BF16 has no target. It rounds x to 8 bits, which changes the embedded model's perplexity by 0.024 %; with x
// in two halves it does no more in a cycle than float32 (docs/design/kernels-cpu.md).
#ifndef KERNELS_CPU_TARGET_H_
#define KERNELS_CPU_TARGET_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace dejavu::cpu {

std::string TargetName();      // of the one in use
std::string DescribeTarget();  // it, and why, for people

// From now on the one of that name. INVALID_ARGUMENT names what there is. Before any backend is created.
absl::Status LimitTarget(absl::string_view name);

// Whether products of pairs of int16 are added to an int32 by one instruction, in registers of Highway's target. Sums
// are integers, so that it changes no bit. Any thread.
bool HasVnni(int64_t target);
void AllowVnni(bool allowed);  // for tests

}  // namespace dejavu::cpu

#endif  // KERNELS_CPU_TARGET_H_
