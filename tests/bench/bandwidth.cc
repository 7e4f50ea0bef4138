#include "tests/bench/bandwidth.h"

#include <cstdio>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/eval/tool.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/load_module.h"
#include "nlohmann/json.hpp"
#include "tests/bench/device_probe.h"
#include "tests/bench/probe.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

// `json` says what was probed.
absl::Status Report(const BandwidthBenchOptions& options, const std::string& probed,
                    const std::vector<double>& gb_per_s, nlohmann::json json) {
  std::printf("%s, %lld MiB, checksum right\n", probed.c_str(), static_cast<long long>(options.buffer_mib));
  std::printf("best %.1f GB/s\n", Most(gb_per_s));
  PrintBandwidth(gb_per_s);
  if (options.json.empty()) return absl::OkStatus();
  json["read_gb_per_s"] = Median(gb_per_s);
  json["best_read_gb_per_s"] = Most(gb_per_s);
  json["spread"] = Spread(gb_per_s);
  json["noisy"] = Spread(gb_per_s) > kNoisySpread;
  return WriteText(options.json, json.dump(1) + "\n");
}

absl::Status Bench(const BandwidthBenchOptions& options) {
  RETURN_IF_ERROR(CheckWritable(options.json));
  std::vector<double> gb_per_s;
  if (options.device == "cuda") {
    ASSIGN_OR_RETURN(const DejavuCudaModule* const module, cuda::LoadModule());
    ASSIGN_OR_RETURN(const auto probe, DeviceProbe::Create(module, 0, options.buffer_mib << 20));
    for (int i = 0; i < options.repeats; ++i) gb_per_s.push_back(probe->Measure());
    return Report(options, probe->Description(), gb_per_s, {{"device", probe->Describe()}});
  }
  ASSIGN_OR_RETURN(const auto probe, BandwidthProbe::Create(options.threads, options.buffer_mib << 20));
  for (int i = 0; i < options.repeats; ++i) gb_per_s.push_back(probe->Measure());
  return Report(options, absl::StrCat(probe->threads(), " threads, ", probe->Description()), gb_per_s,
                {{"threads", probe->threads()}});
}

}  // namespace

int RunBandwidthBench(const BandwidthBenchOptions& options) { return ExitCode(Bench(options)); }

}  // namespace dejavu
