// `dejavu-bench decode`: time of a decode step by tier and batch, without scheduler and server.
#ifndef TESTS_BENCH_DECODE_H_
#define TESTS_BENCH_DECODE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace dejavu {

struct DecodeBenchOptions {
  std::string model;
  std::string predictor;  // empty: predictor.safetensors in the model's directory, if there
  std::string text;       // what is decoded, teacher-forced: sparsity depends on it
  std::vector<int> batches = {1, 8};
  std::vector<std::string> tiers;  // empty: all that can be served
  int context = 64;
  int steps = 100;
  int repeats = 15;
  int threads = 0;
  std::string json;
};

// Exit code.
int RunDecodeBench(const DecodeBenchOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_DECODE_H_
