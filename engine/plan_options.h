// What `dejavud --plan` is asked, beside the daemon's own options: devices, which need not be there. Plain data; any
// thread.
#ifndef ENGINE_PLAN_OPTIONS_H_
#define ENGINE_PLAN_OPTIONS_H_

#include <string>

namespace dejavu {

// Bandwidths are the data sheets', memory is what the driver reports as its total. The times of an all-reduce of a few
// rows among up to kDevicesOfHost are assumptions: GPUs with NVLink, GPUs on PCIe, processes of one host.
struct DeviceKind {
  const char* name;
  double memory_gib;     // 0: must be stated
  double bandwidth_gbs;  // 0: must be stated
  double all_reduce_us;
};
inline constexpr DeviceKind kDeviceKinds[] = {
    {"b200", 179.0, 8000.0, 10.0},   {"h200", 140.4, 4800.0, 10.0},   {"h100", 79.6, 3350.0, 10.0},
    {"a100-80", 80.0, 2039.0, 10.0}, {"a100-40", 40.0, 1555.0, 10.0}, {"l40s", 45.0, 864.0, 30.0},
    {"a10", 22.5, 600.0, 30.0},      {"rtx4090", 24.0, 1008.0, 30.0}, {"cpu", 0.0, 0.0, 10.0},
};
inline constexpr int kDevicesOfHost = 8;
inline constexpr double kHostsFactor = 3.0;  // what an all-reduce takes more where the devices are more than that
inline constexpr int kMaxPlanDevices = 64;

struct PlanOptions {
  std::string device;             // of kDeviceKinds; empty: none of them
  int devices = 1;                // a rank each
  double memory_gib = 0.0;        // of each; 0: the kind's
  double bandwidth_gbs = 0.0;     // that each reads with; 0: the kind's
  double bandwidth_share = 0.85;  // of it, what a decode step reaches
  double all_reduce_us = -1.0;    // negative: the kind's
  int context_tokens = 512;       // of each sequence, where latencies are estimated
  bool json = false;              // else a table for people
};

}  // namespace dejavu

#endif  // ENGINE_PLAN_OPTIONS_H_
