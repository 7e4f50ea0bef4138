// `dejavu-bench bandwidth`: how fast this machine, or its GPU, reads memory now.
#ifndef TESTS_BENCH_BANDWIDTH_H_
#define TESTS_BENCH_BANDWIDTH_H_

#include <cstdint>
#include <string>

namespace dejavu {

struct BandwidthBenchOptions {
  std::string device = "cpu";  // or cuda
  int threads = 0;
  int repeats = 15;
  int64_t buffer_mib = 1024;
  std::string json;
};

// Exit code.
int RunBandwidthBench(const BandwidthBenchOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_BANDWIDTH_H_
