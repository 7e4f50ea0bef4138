// CreateDevice: the backend that options name. Any thread.
#ifndef ENGINE_RANKS_DEVICE_H_
#define ENGINE_RANKS_DEVICE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace dejavu {

struct DeviceOptions {
  std::string device = "auto";  // cpu, cuda, or auto: the GPU if there is one, else the CPU, with the reason in the log
  int threads = 0;              // of the CPU, in all places; 0: as many as are worth it
  bool pin = true;              // one CPU per thread, where they take all CPUs of the process
  int gpu = 0;                  // its number
  int place = 0, places = 1;    // backends that share this process's CPUs, and which of them this one is
  int sharers = 1;              // backends that share the machine's memory
};

// INVALID_ARGUMENT for other devices.
absl::StatusOr<std::unique_ptr<Backend>> CreateDevice(const DeviceOptions& options);

}  // namespace dejavu

#endif  // ENGINE_RANKS_DEVICE_H_
