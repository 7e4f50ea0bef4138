// `dejavu-bench ranks`: what a decode step costs a group of ranks beside one rank on the same CPUs. The group is
// threads of this process; under mpirun its processes.
#ifndef TESTS_BENCH_RANKS_H_
#define TESTS_BENCH_RANKS_H_

#include <string>
#include <vector>

namespace dejavu {

struct RanksBenchOptions {
  std::string model;
  std::string weights = "stored";  // as ModelOptions has it
  std::string predictor;           // likewise
  std::string text;                // as DecodeBenchOptions has it
  std::string device = "cpu";      // likewise
  int ranks = 2;                   // threads; mpirun says how many there are
  std::vector<int> batches = {1, 4, 16};
  int context = 64;
  std::vector<std::string> tiers = {"dense", "exact", "balanced"};
  int steps = 0;  // of one measurement; 0: as many as take half a second
  int repeats = 7;
  int threads = 0;  // all ranks of the group together
  std::string json;
};

// Exit code. Under mpirun all processes call it, with the same options; rank 0 reports.
int RunRanksBench(const RanksBenchOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_RANKS_H_
