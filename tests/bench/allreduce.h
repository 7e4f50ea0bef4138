// `dejavu-bench allreduce`: how long the ranks of a group take to add up their values. Threads of this process; under
// mpirun the processes that it started.
#ifndef TESTS_BENCH_ALLREDUCE_H_
#define TESTS_BENCH_ALLREDUCE_H_

#include <string>

namespace dejavu {

struct AllReduceBenchOptions {
  int ranks = 2;  // threads; mpirun says how many there are
  int repeats = 5;
  std::string json;
};

// Exit code.
int RunAllReduceBench(const AllReduceBenchOptions& options);

}  // namespace dejavu

#endif  // TESTS_BENCH_ALLREDUCE_H_
