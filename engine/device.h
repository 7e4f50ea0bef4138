// CreateDevice: the backend that options name. Any thread.
#ifndef ENGINE_DEVICE_H_
#define ENGINE_DEVICE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace dejavu {

// `device`: cpu, cuda, or auto, which is the first GPU where there is one and else the CPU, with the reason in the log;
// INVALID_ARGUMENT for others. `threads` and `pin` are the CPU's (CpuBackendOptions).
absl::StatusOr<std::unique_ptr<Backend>> CreateDevice(const std::string& device, int threads, bool pin);

}  // namespace dejavu

#endif  // ENGINE_DEVICE_H_
