// `dejavu-bench bandwidth`: how fast this machine, or its GPU, reads memory now.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/load_module.h"
#include "nlohmann/json.hpp"
#include "tests/bench/device_probe.h"
#include "tests/bench/flags.h"
#include "tests/bench/probe.h"
#include "tests/bench/subcommand.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

struct BandwidthOptions {
  std::string device = "cpu";  // or cuda
  int threads = 0;
  int repeats = 15;
  int64_t buffer_mib = 1024;
  std::string json;
};

// `json` says what was probed.
absl::Status Report(const BandwidthOptions& options, const std::string& probed, const std::vector<double>& gb_per_s,
                    nlohmann::json json) {
  std::printf("%s, %lld MiB, checksum right\n", probed.c_str(), static_cast<long long>(options.buffer_mib));
  std::printf("best %.1f GB/s\n", Most(gb_per_s));
  PrintBandwidth(gb_per_s);
  json["read_gb_per_s"] = Median(gb_per_s);
  json["best_read_gb_per_s"] = Most(gb_per_s);
  json["spread"] = Spread(gb_per_s);
  json["noisy"] = Spread(gb_per_s) > kNoisySpread;
  return WriteJson(options.json, json);
}

absl::Status Bench(const BandwidthOptions& options) {
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

Subcommand AddBandwidth(CLI::App& program) {
  const auto options = std::make_shared<BandwidthOptions>();
  CLI::App* const command =
      AddMeasuring(program, "bandwidth", "How fast this machine, or its GPU, reads memory now", *options);
  AddDevice(command, options->device);
  command->add_option("--buffer-mib", options->buffer_mib, "What is read over and over")
      ->check(CLI::Range(4, 1 << 20))
      ->capture_default_str();
  return {command, [options] { return ExitCode(Bench(*options)); }};
}

}  // namespace dejavu
