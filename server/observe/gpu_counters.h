// What NVIDIA's management library reports of this machine's GPUs. The first call loads the library, if there is one.
#ifndef SERVER_OBSERVE_GPU_COUNTERS_H_
#define SERVER_OBSERVE_GPU_COUNTERS_H_

#include <vector>

namespace dejavu {

struct GpuCounters {
  int index = 0;
  double memory_used_bytes = 0.0;
  double utilization = 0.0;  // 0 ... 1
  double power_watts = 0.0;
  double energy_joules = 0.0;
  double ecc_errors = 0.0;
};

// Nothing without a GPU or the library. Any thread.
std::vector<GpuCounters> ReadGpuCounters();

}  // namespace dejavu

#endif  // SERVER_OBSERVE_GPU_COUNTERS_H_
