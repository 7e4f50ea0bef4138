// DeviceProbe: how fast a GPU reads its memory, and what it says of itself. One thread at a time.
#ifndef TESTS_BENCH_DEVICE_PROBE_H_
#define TESTS_BENCH_DEVICE_PROBE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/cuda/abi.h"
#include "nlohmann/json.hpp"

namespace dejavu {

class DeviceProbe {
 public:
  static constexpr int64_t kDefaultBytes = int64_t{1} << 30;

  // On a device of the module, which must outlive the probe. UNAVAILABLE where there is none, RESOURCE_EXHAUSTED
  // without the memory.
  static absl::StatusOr<std::unique_ptr<DeviceProbe>> Create(const DejavuCudaModule* module, int device,
                                                             int64_t bytes = kDefaultBytes);
  ~DeviceProbe();
  DeviceProbe(const DeviceProbe&) = delete;
  DeviceProbe& operator=(const DeviceProbe&) = delete;

  // GB/s (10^9 bytes) of a few passes over the buffer, by the device's own clock. Every pass is added up and checked.
  // Throws std::runtime_error, as the backend does, where the device fails or the sum is wrong.
  double Measure();

  // Name, compute capability, memory, and the CUDA version of the driver.
  nlohmann::json Describe() const;
  std::string Description() const;  // the same on one line

 private:
  DeviceProbe(const DejavuCudaModule* module, int64_t bytes) : module_(*module), bytes_(bytes) {}
  absl::Status Open(int device);
  void Fill();
  void Pass();
  void Try(int result, const char* what) const;
  int64_t threads() const;  // of a pass

  const DejavuCudaModule& module_;
  const int64_t bytes_;
  DejavuCudaContext* context_ = nullptr;
  DejavuCudaDevice device_ = {};
  void* data_ = nullptr;
  void* sums_ = nullptr;   // uint64 [threads]: of all passes
  uint64_t of_pass_ = 0;   // what one pass must add
  uint64_t expected_ = 0;  // of all passes
};

}  // namespace dejavu

#endif  // TESTS_BENCH_DEVICE_PROBE_H_
