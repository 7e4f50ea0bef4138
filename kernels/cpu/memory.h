// The memory of this machine, as far as the CPU backend may have it. Any thread.
#ifndef KERNELS_CPU_MEMORY_H_
#define KERNELS_CPU_MEMORY_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/tensor.h"

namespace dejavu::cpu {

// What nobody has taken of the machine, or of the control group of a container: the part of each of `sharers`.
int64_t FreeBytes(int sharers);

// Zeroed, on huge pages where it is large. RESOURCE_EXHAUSTED with the size asked for.
absl::StatusOr<Buffer> Allocate(int64_t bytes);

}  // namespace dejavu::cpu

#endif  // KERNELS_CPU_MEMORY_H_
