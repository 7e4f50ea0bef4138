// The CPU backend: ops on this machine's processors and memory, done when a call returns.
#ifndef KERNELS_CPU_CPU_BACKEND_H_
#define KERNELS_CPU_CPU_BACKEND_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace dejavu {

struct CpuBackendOptions {
  int threads = 0;  // 0: DefaultThreads()
  // One CPU per thread, as far as the affinity mask reaches. The thread that calls the ops counts: its first op pins
  // it, and threads that it starts afterwards inherit that. Two backends that pin share the same CPUs.
  bool pin = true;
  int first_cpu = 0;              // with `pin`: of those that the process may use, the number of the first thread's
  int sharers = 1;                // backends that share this machine's memory: FreeBytes is this one's part
  std::string threads_because{};  // where `threads` says how many: why, for people
};

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuBackendOptions& options);

}  // namespace dejavu

#endif  // KERNELS_CPU_CPU_BACKEND_H_
