// `dejavu-bench prefill`: how fast prompts go through the model, against the arithmetic peak of this machine.
#ifndef TESTS_BENCH_PREFILL_H_
#define TESTS_BENCH_PREFILL_H_

#include <string>
#include <vector>

namespace dejavu {

struct PrefillBenchOptions {
  std::string model;
  std::string weights = "stored";  // as ModelOptions has it
  std::vector<int> tokens = {16, 64, 128, 512};
  int repeats = 5;
  std::string device = "cpu";  // or cuda
  int threads = 0;
  std::string json;
};

// Exit code.
int RunPrefillBench(const PrefillBenchOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_PREFILL_H_
