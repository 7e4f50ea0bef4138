// DeviceProbe: how fast a GPU reads its memory, and what it says of itself. One thread at a time.
#ifndef TESTS_BENCH_DEVICE_PROBE_H_
#define TESTS_BENCH_DEVICE_PROBE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/abi.h"
#include "nlohmann/json.hpp"

namespace dejavu {

class DeviceProbe {
 public:
  static constexpr int64_t kDefaultBytes = int64_t{1} << 30;

  // On a device of the module, which must outlive the probe. Finds the way of reading that is the fastest there: plain
  // loads of 16 bytes, or rings of asynchronous copies. UNAVAILABLE where there is none, RESOURCE_EXHAUSTED without the
  // memory. Throws as Measure does.
  static absl::StatusOr<std::unique_ptr<DeviceProbe>> Create(const DejavuCudaModule* module, int device,
                                                             int64_t bytes = kDefaultBytes);
  ~DeviceProbe();
  DeviceProbe(const DeviceProbe&) = delete;
  DeviceProbe& operator=(const DeviceProbe&) = delete;

  // GB/s (10^9 bytes) of a few passes over the buffer in that way, by the device's own clock. Every pass is added up
  // and checked. Throws std::runtime_error, as the backend does, where the device fails or the sum is wrong.
  double Measure() { return Measure(way_); }

  // Name, compute capability, memory, the CUDA version of the driver, and what each way of reading gave at first.
  nlohmann::json Describe() const;
  std::string Description() const;  // the same on one line

 private:
  DeviceProbe(const DejavuCudaModule* module, int64_t bytes) : module_(*module), bytes_(bytes) {}
  absl::Status Open(int device);
  void Fill();
  void FindWay();
  double Measure(int way);
  void Pass(int way);
  void Try(int result, const char* what) const;
  int64_t threads() const;  // of a pass at most

  const DejavuCudaModule& module_;
  const int64_t bytes_;
  DejavuCudaContext* context_ = nullptr;
  DejavuCudaDevice device_ = {};
  void* data_ = nullptr;
  void* sums_ = nullptr;   // uint64 [threads]: of all passes
  uint64_t of_pass_ = 0;   // what one pass must add
  uint64_t expected_ = 0;  // of all passes
  int way_ = 0;
  std::vector<double> found_;  // GB/s by way, at first
};

}  // namespace dejavu

#endif  // TESTS_BENCH_DEVICE_PROBE_H_
