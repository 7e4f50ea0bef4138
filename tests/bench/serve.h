// The cost of serving: the same tokens from the engine called directly and through the real server and a gRPC client.
#ifndef TESTS_BENCH_SERVE_H_
#define TESTS_BENCH_SERVE_H_

#include <string>

namespace dejavu {

struct ServeBenchOptions {
  std::string model;
  std::string weights = "stored";  // as ModelOptions has it
  std::string device = "cpu";      // or cuda
  int threads = 0;
  int tokens = 256;
  int repeats = 15;
  std::string json;
};

// Prints a table; returns the process's exit code.
int RunServeBench(const ServeBenchOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_SERVE_H_
