// `dejavu-bench imbalance`: how evenly the active neurons of decode steps fall on the ranks of a group, by how neurons
// are dealt to them. The model runs whole, once for each batch; which rank would have had a neuron is looked up.
#ifndef TESTS_BENCH_IMBALANCE_H_
#define TESTS_BENCH_IMBALANCE_H_

#include <string>
#include <vector>

namespace dejavu {

struct ImbalanceBenchOptions {
  std::string model;
  std::string weights = "stored";  // as ModelOptions has it
  std::string predictor;           // likewise
  std::string text;                // what is decoded, teacher-forced; empty: random tokens
  std::vector<int> ranks = {2, 4, 8};
  std::vector<int> batches = {1, 4, 16};
  std::vector<std::string> tiers = {"balanced"};
  int steps = 10000;
  int window = 256;  // a sequence begins anew after so many positions
  int threads = 0;
  std::string json;
};

// Exit code.
int RunImbalanceBench(const ImbalanceBenchOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_IMBALANCE_H_
