// `dejavu-bench decode`: what a decode step costs by tier, batch and context, without scheduler and server.
#ifndef TESTS_BENCH_DECODE_H_
#define TESTS_BENCH_DECODE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace dejavu {

struct DecodeBenchOptions {
  std::string model;
  std::string weights = "stored";  // as ModelOptions has it
  std::string predictor;           // likewise
  std::string text;                // what is decoded, teacher-forced: sparsity depends on it; empty: random tokens
  std::vector<int> batches = {1, 4};
  std::vector<int> contexts = {256};
  std::vector<std::string> tiers;  // empty: all that can be served; DENSE is always measured
  int steps = 0;                   // of one measurement; 0: as many as take half a second
  int repeats = 7;
  std::string device = "cpu";  // or cuda
  int threads = 0;
  std::string json;
};

// Exit code.
int RunDecodeBench(const DecodeBenchOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_DECODE_H_
