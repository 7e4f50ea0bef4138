#include "tests/bench/bandwidth.h"

#include <cstdio>
#include <vector>

#include "engine/eval/tool.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/bench/probe.h"
#include "tests/bench/tool.h"

namespace dejavu {
namespace {

absl::Status Bench(const BandwidthBenchOptions& options) {
  RETURN_IF_ERROR(CheckWritable(options.json));
  ASSIGN_OR_RETURN(const auto probe, BandwidthProbe::Create(options.threads, options.buffer_mib << 20));
  std::vector<double> gb_per_s;
  for (int i = 0; i < options.repeats; ++i) gb_per_s.push_back(probe->Measure());
  std::printf("%d threads, %s, %lld MiB, checksum right\n", probe->threads(), probe->Description().c_str(),
              static_cast<long long>(options.buffer_mib));
  std::printf("best %.1f GB/s\n", Most(gb_per_s));
  PrintBandwidth(gb_per_s);
  if (options.json.empty()) return absl::OkStatus();
  const nlohmann::json json = {{"threads", probe->threads()},
                               {"read_gb_per_s", Median(gb_per_s)},
                               {"best_read_gb_per_s", Most(gb_per_s)},
                               {"spread", Spread(gb_per_s)},
                               {"noisy", Spread(gb_per_s) > kNoisySpread}};
  return WriteText(options.json, json.dump(1) + "\n");
}

}  // namespace

int RunBandwidthBench(const BandwidthBenchOptions& options) { return ExitCode(Bench(options)); }

}  // namespace dejavu
