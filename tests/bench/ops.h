// `dejavu-bench ops`: each op of the CPU backend against what this machine can do.
#ifndef TESTS_BENCH_OPS_H_
#define TESTS_BENCH_OPS_H_

#include <string>

namespace dejavu {

struct OpsBenchOptions {
  int hidden = 4096;  // the layer of OPT-6.7b
  int ffn = 16384;
  std::string weights = "bf16";  // fp32, fp16, bf16 or int8
  int batch = 1;
  int repeats = 7;
  int threads = 0;
  int working_set_mib = 512;  // what an op goes through before it reads the same bytes again
  std::string json;
};

// Exit code.
int RunOpsBench(const OpsBenchOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_OPS_H_
